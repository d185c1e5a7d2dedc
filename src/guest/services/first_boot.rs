//! A script that runs when the instance boots for the first time, after its network is up, as root. When it fails it runs again at the next boot;
//! when it has succeeded, never again ([`DONE`]).
//!
//! It is under /usr/local/sbin because SELinux policies let init start what is labelled there, and nothing from /var.

use super::Init;
use crate::{
    error::Result,
    fs::edit::Attrs,
    guest::plan::{Plan, Visibility},
};

const SCRIPT: &str = "/usr/local/sbin/cloudlet-first-boot";
const STATE: &str = "/var/lib/cloudlet";
const DONE: &str = "/var/lib/cloudlet/first-boot.done";
const WHY: &str = "first-boot script of the request";

const UNIT: &str = "# Written by cloudletd.
[Unit]
Description=First-boot script of this instance
ConditionPathExists=!/var/lib/cloudlet/first-boot.done
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/cloudlet-first-boot
ExecStartPost=/bin/touch /var/lib/cloudlet/first-boot.done
RemainAfterExit=yes
TimeoutStartSec=infinity
StandardOutput=journal+console

[Install]
WantedBy=multi-user.target
";

const OPENRC: &str = "#!/sbin/openrc-run
# Written by cloudletd.
description=\"First-boot script of this instance\"

depend() {
    after net sshd
}

start() {
    [ -e /var/lib/cloudlet/first-boot.done ] && return 0
    ebegin \"Running the first-boot script\"
    /usr/local/sbin/cloudlet-first-boot && touch /var/lib/cloudlet/first-boot.done
    eend $?
}
";

const SYSV: &str = "#!/bin/sh
# Written by cloudletd.
### BEGIN INIT INFO
# Provides:          cloudlet-first-boot
# Required-Start:    $remote_fs $network
# Required-Stop:
# Default-Start:     2 3 4 5
# Default-Stop:
# Short-Description: First-boot script of this instance
### END INIT INFO

[ \"$1\" = start ] || exit 0
[ -e /var/lib/cloudlet/first-boot.done ] && exit 0
/usr/local/sbin/cloudlet-first-boot && touch /var/lib/cloudlet/first-boot.done
";

/// Writes the script and what starts it.
pub(super) fn write(plan: &mut Plan<'_>, script: &[u8], init: Init) -> Result<()> {
    debug_assert!(UNIT.contains(DONE) && UNIT.contains(SCRIPT));
    plan.write_as(SCRIPT, script, Attrs::root(0o700), WHY, Visibility::Secret)?;
    plan.make_dir(STATE, Attrs::root(0o755), WHY)?;
    match init {
        Init::Systemd => {
            let path = "/etc/systemd/system/cloudlet-first-boot.service";
            plan.write(path, UNIT, 0o644, WHY)?;
            plan.symlink("/etc/systemd/system/multi-user.target.wants/cloudlet-first-boot.service", path, WHY)
        }
        Init::OpenRc => {
            plan.write("/etc/init.d/cloudlet-first-boot", OPENRC, 0o755, WHY)?;
            plan.symlink("/etc/runlevels/default/cloudlet-first-boot", "/etc/init.d/cloudlet-first-boot", WHY)
        }
        Init::SysV => {
            plan.write("/etc/init.d/cloudlet-first-boot", SYSV, 0o755, WHY)?;
            ['2', '3', '4', '5']
                .iter()
                .try_for_each(|level| plan.symlink(&format!("/etc/rc{level}.d/S99cloudlet-first-boot"), "../init.d/cloudlet-first-boot", WHY))
        }
    }
}
