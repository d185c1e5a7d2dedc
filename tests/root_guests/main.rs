//! Rendered and injected trees before tools that need root: mounts, network namespaces, chroots, confined workers.

mod boot_judges;
mod boot_platforms;
#[path = "../common/mod.rs"]
mod common;
mod filesystems;
mod guest_judges;
mod keeper;
mod net_judges;
mod readers;
mod reconfigure;
mod selinux;
mod worker;
