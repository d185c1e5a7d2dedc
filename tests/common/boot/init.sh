#!/bin/busybox sh
# PID 1 of the initramfs: reaches the root filesystem and hands over to the report script in it.
# Parameters on the kernel command line: boot.root (device), boot.fs (its type), boot.tool and the rest for the report script.
b=/bin/busybox
fail() {
    echo "init: $1" >/dev/console
    $b stty -F /dev/ttyS1 raw 2>/dev/null
    echo "failed $(echo "$1" | $b base64 -w 0)" >/dev/ttyS1
    $b poweroff -f
}
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module; do
    $b insmod "/$module" || fail "cannot load $module"
done </modules/order
for word in $($b cat /proc/cmdline); do
    case "$word" in
        boot.root=*) root=${word#boot.root=} ;;
        boot.fs=*) fs=${word#boot.fs=} ;;
    esac
done
tries=0
while ! [ -b "$root" ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || fail "no $root: $(echo /dev/vd*)"
    $b usleep 50000
done
$b mount -t "$fs" -o rw "$root" /root || fail "cannot mount $root as $fs"
[ -x /root/bin/sh ] || [ -L /root/bin/sh ] || fail "$root has no /bin/sh"
$b mount -t tmpfs -o mode=0755 tmpfs /root/run
$b mkdir /root/run/boot
$b cp /bin/busybox /report.sh /root/run/boot/
$b mount --move /proc /root/proc
$b mount --move /sys /root/sys
$b mount --move /dev /root/dev
exec $b switch_root /root /bin/sh /run/boot/report.sh
