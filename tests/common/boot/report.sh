#!/bin/sh
# shellcheck disable=SC2013,SC2002,SC2012 # Words are wanted, and the lists are short.
# Runs in the guest's own root: as PID 1 of a fast boot, where it starts the guest's network tool by hand, or as a unit of a full
# boot, where systemd has done so. Then it says what it finds, on the second serial port, one "KEY BASE64" line per item, and powers off.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
out=/dev/ttyS1
say() { # KEY, value on standard input
    printf '%s %s\n' "$1" "$(base64 --wrap=0)" >$out
}
log() { echo "[$(cut -d. -f1 /proc/uptime) s] report: $*" >/dev/console; }

for word in $(cat /proc/cmdline); do
    case "$word" in
        boot.tool=*) tool=${word#boot.tool=} ;;
        boot.files=*) files=$(echo "${word#boot.files=}" | tr ',' ' ') ;;
        boot.settle=*) settle=${word#boot.settle=} ;;
        boot.mounts=*) mounts=${word#boot.mounts=} ;;
        boot.visit=*) visit=${word#boot.visit=} ;;
    esac
done
settle=${settle:-60}
stty -F $out raw -echo
# What firmware has drawn there may not end with a line.
echo >$out

# Waits until a command succeeds. until_true SECONDS COMMAND...
until_true() {
    left=$(($1 * 4))
    shift
    while ! "$@"; do
        left=$((left - 1))
        [ $left -gt 0 ] || return 1
        sleep 0.25
    done
}

# Names from .link files and the "initialized" mark that networkd and NetworkManager wait for come from udev.
start_udev() {
    for udevd in /usr/lib/systemd/systemd-udevd /lib/systemd/systemd-udevd; do
        [ -x $udevd ] || continue
        $udevd --daemon
        # Only network cards matter here; a trigger of everything would load drivers for a minute.
        udevadm trigger --type=devices --subsystem-match=net --action=add
        udevadm settle --timeout=30
        return
    done
    log "the guest has no udev"
}

# Every network card is configured as far as networkd is concerned. With router advertisements on, networkd 252 stays at "configuring"
# for 12 seconds when no router answers; a card that is routable and has not changed for 3 seconds is taken as done too.
networkd_settled() {
    states=""
    settled=yes
    for card in /sys/class/net/*; do
        [ -e "$card/device" ] || continue
        read -r index <"$card/ifindex"
        admin=""
        oper=""
        while IFS='=' read -r key value; do
            case "$key" in
                ADMIN_STATE) admin=$value ;;
                OPER_STATE) oper=$value ;;
            esac
        done <"/run/systemd/netif/links/$index" || settled=no
        case "$admin,$oper" in
            configured,* | unmanaged,* | failed,*) ;;
            configuring,routable) [ $settled = no ] || settled=maybe ;;
            *) settled=no ;;
        esac
        states="$states $index $admin $oper"
    done 2>/dev/null
    states="$states $(ip addr show | cksum) $(ip route show | cksum) $(ip -6 route show | cksum)"
    if [ "$states" != "$last_states" ]; then
        last_states=$states
        read -r last_change rest </proc/uptime
    fi
    read -r now rest </proc/uptime
    [ $settled = yes ] || { [ $settled = maybe ] && [ $((${now%.*} - ${last_change%.*})) -ge 3 ]; }
}

# What networkd knows of resolvers has reached resolved's file.
resolved_settled() {
    known=$(cat /run/systemd/resolve/resolv.conf)
    for server in $(sed -n 's/^DNS=//p' /run/systemd/netif/links/* 2>/dev/null); do
        case "$known" in
            *"nameserver $server"*) ;;
            *) return 1 ;;
        esac
    done
}

start_networkd() {
    mkdir -p /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp
    chown -R systemd-network:systemd-network /run/systemd/netif
    start_udev
    log "udev is ready"
    /lib/systemd/systemd-networkd >/dev/console 2>&1 &
    until_true "$settle" networkd_settled || log "networkd did not settle"
    log "networkd has settled"
    if [ -x /lib/systemd/systemd-resolved ] && [ -L /etc/resolv.conf ]; then
        mkdir -p /run/systemd/resolve
        chown systemd-resolve:systemd-resolve /run/systemd/resolve
        /lib/systemd/systemd-resolved >/dev/console 2>&1 &
        until_true 15 test -e /run/systemd/resolve/resolv.conf || log "resolved did not start"
        until_true 15 resolved_settled || log "resolved did not settle"
    fi
}

start_netplan() {
    for generate in /usr/libexec/netplan/generate /usr/lib/netplan/generate /lib/netplan/generate; do
        [ -x $generate ] || continue
        $generate || log "netplan generate failed"
        break
    done
    start_networkd
}

start_networkmanager() {
    start_udev
    mkdir -p /run/dbus /run/NetworkManager
    dbus-daemon --system --fork --nopidfile >/dev/console 2>&1
    NetworkManager >/dev/console 2>&1
    # On a busy machine the first answer of NetworkManager can take longer than nm-online's own limit.
    for _ in 1 2 3; do
        nm-online --wait-for-startup --quiet --timeout="$settle" && return
    done
    log "NetworkManager did not settle"
}

start_by_hand() {
    mkdir -p /run/lock /run/network /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /tmp
    hostname --file /etc/hostname
    # Duplicate address detection would add a second and a half, and no neighbour is there to object.
    for knob in /proc/sys/net/ipv6/conf/*/accept_dad; do
        echo 0 >"$knob"
    done
    ip link set dev lo up
    if [ -n "$mounts" ]; then
        mount --all >/dev/console 2>&1 || log "mount failed: $?"
        swapon --all >/dev/console 2>&1 || log "swapon failed: $?"
    fi
    case "$tool" in
        ifupdown)
            start_udev
            ifup --all || log "ifup failed: $?"
            ;;
        networkd) start_networkd ;;
        netplan) start_netplan ;;
        networkmanager) start_networkmanager ;;
        none) ;;
        *) log "unknown tool $tool" ;;
    esac
}

[ $$ -ne 1 ] || start_by_hand
uptime=$(cut -d' ' -f1 /proc/uptime)
ip -j addr show | say addresses
ip -j -4 route show | say routes4
ip -j -6 route show | say routes6
say resolv_conf </etc/resolv.conf
[ ! -e /run/systemd/resolve/resolv.conf ] || say resolved </run/systemd/resolve/resolv.conf
hostname | say hostname
say etc_hostname </etc/hostname
say machine_id </etc/machine-id
say cmdline </proc/cmdline
cat /proc/sys/kernel/osrelease | say kernel
findmnt --noheadings --output SOURCE,FSTYPE,OPTIONS / 2>/dev/null | say root
for path in $files; do
    if [ -L "$path" ]; then
        printf '%s\n' "$path" "$(stat --format='%a %u %g' "$path")" "link" "$(readlink "$path")" | say file
    elif [ -f "$path" ]; then
        printf '%s\n' "$path" "$(stat --format='%a %u %g' "$path")" "file" "$(base64 --wrap=0 "$path")" | say file
    elif [ -d "$path" ]; then
        printf '%s\n' "$path" "$(stat --format='%a %u %g' "$path")" "directory" "$(ls -A "$path" | tr '\n' ' ')" | say file
    else
        printf '%s\n' "$path" "0 0 0" "missing" "" | say file
    fi
done
if [ $$ -ne 1 ]; then
    systemctl list-units --failed --plain --no-legend | say failed_units
fi
echo "$uptime" | say uptime
sync
case "$(cat /proc/cmdline)" in
    # Whoever looks at the disk next finds an empty journal, as after a shutdown.
    *boot.clean=1*) mount -o remount,ro / 2>/dev/null || { echo u >/proc/sysrq-trigger; sleep 2; } ;;
esac
# The mark that nothing is missing.
echo complete | say end
[ -z "$visit" ] || until_true "$visit" test -e /run/boot/visited || log "nobody came"
if [ $$ -ne 1 ]; then
    systemctl poweroff --force --force
fi
/run/boot/busybox poweroff -f
