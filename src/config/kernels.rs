//! `[[kernel]]`: kernels of the provider's, for images that bring none.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Deserialize;

use crate::{
    boot::supplied::{Modules, Source},
    error::{Error, Result, Stage},
    manifest::KernelSpec,
    names::{Digest, PoolName},
};

/// Bytes of the arguments that a kernel always gets; the kernel takes 2047 with those of manifest and platform.
const CMDLINE_LEN_MAX: usize = 1024;

/// A kernel as it is configured.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelConfig {
    /// Name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: PoolName,
    /// The kernel; absolute.
    pub kernel: PathBuf,
    /// Digest that it has to have (`sha256:…`). Default: any.
    pub digest: Option<Digest>,
    /// Its initrd; absolute. Default: none.
    pub initrd: Option<PathBuf>,
    /// Digest that the initrd has to have. Default: any.
    pub initrd_digest: Option<Digest>,
    /// The kernel's configuration (`config-VERSION`), which says what drivers are built in; absolute. Default: none, and then that is not known.
    pub config: Option<PathBuf>,
    /// `none`: the guest needs no modules but the initrd's; `image`: it has those of exactly this kernel itself. Default: none.
    pub modules: Option<Modules>,
    /// Arguments that it always gets, before those of the manifest. Default: none.
    #[serde(default)]
    pub cmdline: String,
    /// Operating system, as manifests ask for it. Default: linux.
    pub os: Option<String>,
    /// Version, as manifests ask for it. Default: what the kernel's file says.
    pub version: Option<String>,
    /// Flavor, as manifests ask for it. Default: none.
    pub flavor: Option<String>,
}

impl KernelConfig {
    /// With the defaults filled in.
    pub fn source(&self) -> Source {
        Source {
            name: self.name.to_string(),
            kernel: self.kernel.clone(),
            digest: self.digest,
            initrd: self.initrd.clone(),
            initrd_digest: self.initrd_digest,
            config: self.config.clone(),
            modules: self.modules.unwrap_or(Modules::None),
            cmdline: self.cmdline.clone(),
            offers: KernelSpec {
                os: Some(self.os.clone().unwrap_or_else(|| "linux".to_owned())),
                version: self.version.clone(),
                flavor: self.flavor.clone(),
            },
        }
    }
}

/// Refuses what does not fit together. The files are looked at when a kernel is needed.
pub(super) fn check(kernels: &[KernelConfig]) -> Result<()> {
    let mut names = BTreeSet::new();
    for (index, kernel) in kernels.iter().enumerate() {
        let wrong = |key: &str, why: String| {
            let field = format!("kernel[{index}].{key}");
            Err(Error::field(Stage::Config, &field, format!("{field}: {why}")))
        };
        if !names.insert(&kernel.name) {
            return wrong("name", format!("{} is there twice", kernel.name));
        }
        for (key, path) in [("kernel", Some(&kernel.kernel)), ("initrd", kernel.initrd.as_ref()), ("config", kernel.config.as_ref())] {
            if let Some(path) = path
                && !path.is_absolute()
            {
                return wrong(key, format!("{path:?} is not an absolute path"));
            }
        }
        if kernel.initrd_digest.is_some() && kernel.initrd.is_none() {
            return wrong("initrd_digest", "goes with initrd".into());
        }
        if kernel.cmdline.len() > CMDLINE_LEN_MAX || !kernel.cmdline.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
            return wrong("cmdline", format!("is at most {CMDLINE_LEN_MAX} printable ASCII characters"));
        }
        if kernel.cmdline.split_ascii_whitespace().any(|word| word == "--") {
            return wrong("cmdline", "arguments of init (after --) are the manifest's".into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn a_kernel_needs_a_name_and_a_path_and_has_defaults_for_the_rest() {
        let config = Config::parse("[[kernel]]\nname='k'\nkernel='/srv/vmlinuz'").expect("a configuration");
        let source = config.kernels[0].source();
        assert_eq!((source.offers.os.as_deref(), source.offers.version, source.cmdline.as_str()), (Some("linux"), None, ""));
    }

    #[test]
    fn contradictions_are_named() {
        let kernel = "[[kernel]]\nname='k'\nkernel='/srv/vmlinuz'\n";
        for (text, want) in [
            (format!("{kernel}{kernel}"), "kernel[1].name"),
            (kernel.replace("/srv", "srv"), "kernel[0].kernel"),
            (format!("{kernel}initrd='x'"), "kernel[0].initrd"),
            (format!("{kernel}initrd_digest='sha256:{}'", "0".repeat(64)), "kernel[0].initrd_digest"),
            (format!("{kernel}cmdline='a -- b'"), "kernel[0].cmdline"),
            (format!("{kernel}cmdline=\"a\\nb\""), "kernel[0].cmdline"),
            (format!("{kernel}modules='some'"), "modules"),
            (format!("{kernel}digest='sha1:0'"), "digest"),
        ] {
            let error = Config::parse(&text).expect_err(&text);
            assert!(error.chain().contains(want), "{text}: {}", error.chain());
        }
    }
}
