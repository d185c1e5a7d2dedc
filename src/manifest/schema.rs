//! The published JSON Schema of manifests, for editors and for those who write manifests by program. [`super::Manifest::parse`] is stricter: it also
//! compiles patterns, args and URLs, and knows what a schema can't say.

use serde_json::{Value, json};

use super::{args::ARGS_LEN_MAX, lxd, template, volatile};

/// The schema's own identifier.
pub const ID: &str = "urn:cloudletd:manifest:0.0.4";

/// The schema, draft 2020-12. `proto/manifest.schema.json` is a copy of it.
pub fn schema() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        "title": "Cloudlet manifest",
        "description": "What an image is: the cloudlets format 0.0.4 of 2010, and beside it what a provider needs to render the image. No field is \
            required. At most 1 MiB of JSON, nested at most 64 deep, no key twice. Fields whose names start with x- are free for vendors.",
        "type": "object",
        "properties": {
            "name": line("Short name of the image, such as debian-5.0.", 255),
            "description": {"description": "What the image is, for people; may have several lines.", "type": "string", "maxLength": 4096},
            "author": line("Who made the image, such as: Name <address>.", 1024),
            "arch": {
                "description": "Hardware architecture, such as i386, x86_64, amd64 or arm64. Default: the architecture of the host.",
                "type": "string", "pattern": "^[A-Za-z0-9._-]{1,32}$"
            },
            "args": args(),
            "templates": {
                "description": format!("Absolute paths of files in the image that are templates: <%= expression %>, <% if … %>, <% for … %> in Jinja's \
                    language, UTF-8, at most {} bytes each. They are rendered once per instance, with args, dns, ip, instance, network and image. \
                    Symlinks are followed inside the image.", template::SOURCE_LEN_MAX),
                "type": "array", "default": [], "maxItems": 1024, "items": {"$ref": "#/$defs/path"}
            },
            "persistent": {
                "description": "Absolute paths of files and directories that hold data to keep.",
                "type": "array", "default": [], "maxItems": 1024, "items": {"$ref": "#/$defs/path"}
            },
            "volatile": {
                "description": "Regular expressions, Python's with look-around, anchored at the start, of paths (with their leading slash) that are not \
                    part of the image.",
                "type": "array", "default": [], "maxItems": volatile::PATTERNS_MAX,
                "items": {"type": "string", "minLength": 1, "maxLength": volatile::PATTERN_LEN_MAX}
            },
            "entry_points": entry_points(),
            "rootfs": rootfs(),
            "filesystem": {"$ref": "#/$defs/filesystem", "description": "The filesystem that the root becomes."},
            "disk": disk(),
            "boot": boot(),
            "devices": devices(),
            "network": object("The guest's network configuration.", json!({
                "backend": {
                    "description": "What the guest reads; default: found by looking at the image.",
                    "enum": crate::guest::config::BackendKind::ALL.map(crate::guest::config::BackendKind::name)
                }
            })),
            "lxd": lxd()
        },
        "patternProperties": {"^x-": {}},
        "additionalProperties": false,
        "$defs": {
            "path": {
                "description": "An absolute path in the image, not the root, without .. components, at most 4096 bytes.",
                "type": "string", "pattern": "^/+[^/\\u0000]", "maxLength": 4096, "not": {"pattern": "(^|/)\\.\\.(/|$)"}
            },
            "size": {
                "description": "A number of bytes, or a string with a unit: KiB, MiB, GiB, TiB (powers of 1024; K, M, G and T too) or kB, MB, GB, TB \
                    (powers of 1000).",
                "oneOf": [
                    {"type": "integer", "minimum": 1, "maximum": 1_125_899_906_842_624_u64},
                    {"type": "string", "pattern": "^[0-9]+ *(B|K|KiB|M|MiB|G|GiB|T|TiB|kB|KB|MB|GB|TB)?$"}
                ]
            },
            "kernel": object("A kernel.", json!({
                "os": line("Operating system, such as linux.", 64),
                "version": line("Version, such as 2.6.32.", 64),
                "flavor": line("Build, such as xen-686.", 64)
            })),
            "filesystem": filesystem()
        }
    })
}

fn object(description: &str, properties: Value) -> Value {
    json!({"description": description, "type": "object", "properties": properties, "patternProperties": {"^x-": {}}, "additionalProperties": false})
}

fn line(description: &str, len_max: usize) -> Value {
    json!({"description": description, "type": "string", "maxLength": len_max, "pattern": "^[^\\u0000-\\u001f\\u007f-\\u009f]*$"})
}

fn args() -> Value {
    json!({
        "description": format!("What a user may configure: a map of names to JSON Schemas (a member without any schema keyword is a group of further \
            names), or one whole JSON Schema of type object. A value without default is required unless \"optional\": true; a whole schema that says \
            $schema or lists required means just that. Values marked \"writeOnly\": true or \"format\": \"password\" are secret. References stay in \
            the schema. The values have at most {ARGS_LEN_MAX} bytes as JSON."),
        "type": "object", "default": {}
    })
}

fn entry_points() -> Value {
    let command = |description: &str| json!({"description": description, "type": ["string", "array"], "items": {"type": "string", "maxLength": 4096}, "maxLength": 4096});
    object(
        "The ways the image can be started.",
        json!({
            "kernel": {"$ref": "#/$defs/kernel", "description": "The image brings a kernel; a boot loader can start it."},
            "init": object("The image needs somebody else's kernel, and says which.", json!({"kernel": {"$ref": "#/$defs/kernel"}})),
            "chroot": object("The image can be used by changing root into it. Kept, never run.", json!({
                "command": command("The image's program: a command for a shell, or a list of words."),
                "enter": command("What to do before it."),
                "exit": command("What to do after it.")
            }))
        }),
    )
}

fn rootfs() -> Value {
    object(
        "The tarball with the root filesystem. Without url it is uploaded with the manifest or lies beside it.",
        json!({
            "url": {
                "description": "Absolute URL without user name, password or fragment. Which schemes and hosts are allowed is the host's policy.",
                "type": "string", "maxLength": 2048, "pattern": "^[a-z][a-z0-9+.-]*://[^\\s]*$"
            },
            "digest": {"description": "SHA-256 of the bytes as they are transferred.", "type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
            "size": {"$ref": "#/$defs/size", "description": "Exact number of bytes as they are transferred."},
            "media_type": {
                "description": "Media type, such as application/gzip or application/vnd.oci.image.layer.v1.tar+zstd. Default: the first bytes tell.",
                "type": "string", "pattern": "^[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}$"
            },
            "prefix": {
                "$ref": "#/$defs/path",
                "description": "Directory in the tarball that is the root of the tree, such as /rootfs of LXD's unified tarballs. Default: the tarball's own root."
            }
        }),
    )
}

fn lxd() -> Value {
    let id = json!({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]{1,10}$"}]});
    object(
        "Templates of LXD and Incus, in the words of their metadata.yaml; `cloudletd manifest from-lxd` makes this of an image's tarball.",
        json!({
            "templates": {
                "description": "By the path of the file that is written. What injection or the request writes is not overwritten.",
                "type": "object", "maxProperties": lxd::TEMPLATES_MAX,
                "additionalProperties": {
                    "type": "object", "required": ["when", "template"], "additionalProperties": false,
                    "properties": {
                        "when": {"type": "array", "items": {"enum": lxd::Trigger::ALL.map(lxd::Trigger::name)}},
                        "create_only": {"description": "A file that is there is left as it is.", "type": "boolean", "default": false},
                        "template": {"description": "Name of one of files.", "type": "string"},
                        "properties": {"type": ["object", "null"], "additionalProperties": {"type": ["string", "number", "boolean", "null"]}},
                        "mode": {"description": "Octal.", "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-7]{1,4}$"}]},
                        "uid": id, "gid": id
                    }
                }
            },
            "files": {
                "description": format!("The templates by name, at most {} bytes each: {{{{ container.name }}}}, {{% if … %}}, config_get(\"user.key\", default), in \
                    the part of pongo2 that published images use. args are user.….", template::SOURCE_LEN_MAX),
                "type": "object", "additionalProperties": {"type": "string"}
            }
        }),
    )
}

fn filesystem() -> Value {
    object(
        "A filesystem; what is left out is decided by the host's configuration.",
        json!({
            "type": {"description": "Which one. Default: ext4 or what the host says.", "enum": ["ext4", "xfs", "btrfs"]},
            "label": {
                "description": "Label: at most 16 bytes for ext4, 12 for xfs, 255 for btrfs.",
                "type": "string", "pattern": "^[A-Za-z0-9._-]{1,255}$"
            },
            "bytes_per_inode": {"description": "Bytes of disk per inode, ext4 only. Default 16384.", "type": "integer", "minimum": 1024, "maximum": 67_108_864},
            "profile": {
                "description": "ext4 features: modern (for GRUB 2.12 and later and for kernels the host loads), grub206 (for GRUB up to 2.06), compat (for \
                    pygrub's own reader and extlinux). Default: what suits the disk's layout.",
                "enum": ["modern", "grub206", "compat"]
            }
        }),
    )
}

fn disk() -> Value {
    object(
        "The disk that the root lies on; what is left out is decided by the host's configuration.",
        json!({
            "layout": {"description": "bare: the disk is the filesystem. gpt: a partition table with what booting needs. hybrid: the same with the root in the MBR too.", "enum": ["bare", "gpt", "hybrid"]},
            "size": {"$ref": "#/$defs/size", "description": "Size of the golden disk, a multiple of 1 MiB, at least 8 MiB. An instance's disk may be larger."},
            "esp_size": {"$ref": "#/$defs/size", "description": "Size of the EFI system partition, a multiple of 1 MiB from 64 MiB (the default) to 1 GiB. systemd-boot has kernels there."},
            "bus": {"description": "How the disk is attached.", "enum": ["virtio", "scsi", "sata", "ide", "nvme", "xen"]}
        }),
    )
}

fn boot() -> Value {
    let mut boot = object(
        "Hints for images whose kernel is not where distributions put it.",
        json!({
            "kernel": {"$ref": "#/$defs/path", "description": "The kernel's path in the image."},
            "initrd": {"$ref": "#/$defs/path", "description": "The initial RAM filesystem's path in the image; only with a kernel."},
            "cmdline": line("Kernel command line.", 2048)
        }),
    );
    boot["dependentRequired"] = json!({"initrd": ["kernel"]});
    boot
}

fn devices() -> Value {
    let mut device = object(
        "A disk of an instance.",
        json!({
            "name": {"description": "What requests call it. Default: the role, with a number from the second of a role on.", "type": "string", "pattern": "^[a-z][a-z0-9-]{0,11}$"},
            "persistent": {"description": "Whether this data device holds what is at the persistent paths, and is mounted there.", "type": "boolean", "default": false},
            "role": {"description": "root: the image itself (at most one). data: outlives the instance. swap. scratch: may be lost.", "enum": ["root", "data", "swap", "scratch"]},
            "size": {"$ref": "#/$defs/size", "description": "A multiple of 1 MiB. For the root the default is disk.size; required for the others."},
            "filesystem": {"$ref": "#/$defs/filesystem"},
            "mount": {"description": "Absolute path where the guest mounts it; needs a filesystem.", "type": "string", "pattern": "^/", "maxLength": 4096}
        }),
    );
    device["required"] = json!(["role"]);
    device["if"] = json!({"properties": {"role": {"const": "root"}}});
    device["else"] = json!({"required": ["size"]});
    json!({"description": "The disks that an instance has, in order.", "type": "array", "default": [], "maxItems": 16, "items": device})
}
