//! Squashfs images against other people's tools: squashfs-tools makes them, from tarballs and from directories, and what is read is what the tar reader reads of the tarball.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::common::server::{self, Daemon, judge, member, spec};
use cloudletd::{
    error::Kind,
    names::{Digest, GuestPath},
    progress::Progress,
    proto::{self, RenderState},
    tree::{
        EntryKind,
        archive::{self, Limits},
        model::Model,
        squashfs,
    },
};

/// Everything that a tree can have: the tarball is made by GNU tar's rules of the crate, with PAX headers for attributes.
fn tarball() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let xattrs = |tar: &mut tar::Builder<Vec<u8>>, pairs: &[(&str, &[u8])]| {
        tar.append_pax_extensions(pairs.iter().map(|(name, value)| (*name, *value))).expect("appended");
    };
    member(&mut tar, "./", tar::EntryType::Directory, 0o755, b"");
    for dir in ["etc", "usr", "usr/bin", "usr/share", "empty", "many", "dev", "var", "var/lib"] {
        let mode = if dir == "empty" { 0o1777 } else { 0o755 };
        member(&mut tar, dir, tar::EntryType::Directory, mode, b"");
    }
    member(&mut tar, "etc/hostname", tar::EntryType::Regular, 0o644, b"image\n");
    member(&mut tar, "etc/empty", tar::EntryType::Regular, 0o600, b"");
    // One block and a half, several blocks without an end of their own, and one that does not compress.
    let noise = |len: u32| -> Vec<u8> { (0..len).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8 ^ (index >> 17) as u8).collect() };
    member(&mut tar, "usr/bin/half", tar::EntryType::Regular, 0o4755, &noise(200_000));
    member(&mut tar, "usr/bin/whole", tar::EntryType::Regular, 0o2755, &noise(3 << 20));
    let mut holes = vec![0; 5 << 20];
    holes[2 << 20..(2 << 20) + 5].copy_from_slice(b"there");
    holes.extend_from_slice(b"end");
    member(&mut tar, "usr/share/holes", tar::EntryType::Regular, 0o644, &holes);
    member(&mut tar, "usr/share/zeros", tar::EntryType::Regular, 0o644, &vec![0; 1 << 20]);
    for number in 0..700 {
        member(&mut tar, &format!("many/file-{number:04}"), tar::EntryType::Regular, 0o640, format!("content {number}\n").as_bytes());
    }
    xattrs(
        &mut tar,
        &[("SCHILY.xattr.user.comment", b"of a file"), ("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0")],
    );
    member(&mut tar, "usr/bin/ping", tar::EntryType::Regular, 0o755, b"\x7fELF");
    // A large value, twice: stored once.
    let large = vec![b'v'; 3000];
    for name in ["var/lib/one", "var/lib/two"] {
        xattrs(&mut tar, &[("SCHILY.xattr.user.large", &large), ("SCHILY.xattr.trusted.t", b"\0\xff")]);
        member(&mut tar, name, tar::EntryType::Regular, 0o644, b"x");
    }
    xattrs(&mut tar, &[("SCHILY.xattr.security.selinux", b"system_u:object_r:etc_t:s0\0")]);
    member(&mut tar, "var/labelled", tar::EntryType::Directory, 0o750, b"");
    for (path, kind, target) in [
        ("usr/bin/sh", tar::EntryType::Symlink, "half"),
        ("bin", tar::EntryType::Symlink, "usr/bin"),
        ("usr/bin/other", tar::EntryType::Link, "usr/bin/half"),
        ("etc/third", tar::EntryType::Link, "usr/bin/half"),
    ] {
        let mut header = header(path, kind);
        header.set_link_name(target).expect("short");
        header.set_cksum();
        tar.append(&header, &b""[..]).expect("appended");
    }
    for (path, kind, major, minor) in
        [("dev/null", tar::EntryType::Char, 1, 3), ("dev/sda300", tar::EntryType::Block, 259, 70_000), ("dev/pipe", tar::EntryType::Fifo, 0, 0)]
    {
        let mut header = header(path, kind);
        if kind != tar::EntryType::Fifo {
            header.set_device_major(major).expect("ustar");
            header.set_device_minor(minor).expect("ustar");
        }
        header.set_cksum();
        tar.append(&header, &b""[..]).expect("appended");
    }
    tar.into_inner().expect("a tarball")
}

fn header(path: &str, kind: tar::EntryType) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_path(path).expect("short");
    header.set_entry_type(kind);
    header.set_mode(if kind == tar::EntryType::Symlink { 0o777 } else { 0o620 });
    header.set_uid(1000);
    header.set_gid(100_000);
    header.set_mtime(1_600_000_000);
    header.set_size(0);
    header
}

/// squashfs-tools' own way from a tarball to an image.
#[track_caller]
fn sqfstar(dir: &Path, tar: &[u8], options: &[&str]) -> PathBuf {
    let (tarball, image) = (dir.join("tree.tar"), dir.join(format!("{}.squashfs", options.join("_"))));
    fs::write(&tarball, tar).expect("written");
    let input = File::open(&tarball).expect("there");
    let output = Command::new("sqfstar").args(options).arg(&image).stdin(input).stdout(Stdio::piped()).output().expect("squashfs-tools is needed");
    assert!(output.status.success(), "sqfstar {options:?}: {}", String::from_utf8_lossy(&output.stderr));
    image
}

fn of_tar(tar: &[u8]) -> Model {
    let mut model = Model::default();
    archive::read(&mut &tar[..], &Limits::default(), &|_| false, &mut model, &Progress::default()).expect("a tarball");
    model
}

fn of_squashfs(image: &Path) -> Model {
    let mut model = Model::default();
    let file = File::open(image).expect("there");
    squashfs::read(&file, &Limits::default(), &|_| false, &mut model, &Progress::default()).unwrap_or_else(|error| panic!("{}", error.chain()));
    model
}

/// A tree without what the two forms may do in different ways: where holes are, and in which order names came.
fn plain(model: &Model) -> BTreeMap<String, String> {
    let describe = |path: &GuestPath, node: &cloudletd::tree::model::Node| {
        let kind = match &node.kind {
            EntryKind::File { size, .. } => format!("file {size} {}", Digest::of(&node.content(1 << 30).expect("content"))),
            other => format!("{other:?}"),
        };
        let mut links: Vec<String> = model.links(path).iter().map(ToString::to_string).collect();
        links.sort();
        format!("{kind} {:?} {links:?}", node.meta)
    };
    model.iter().map(|(path, node)| (path.to_string(), describe(path, node))).collect()
}

#[test]
fn an_image_is_the_same_tree_as_the_tarball_it_was_made_from() {
    let dir = tempfile::tempdir().expect("a directory");
    let tar = tarball();
    let mut wanted = plain(&of_tar(&tar));
    // sqfstar makes a root of its own.
    wanted.remove("/").expect("a root");
    assert!(wanted.len() > 715, "{}", wanted.len());
    for options in [
        &["-comp", "gzip"][..],
        &["-comp", "xz"],
        &["-comp", "zstd"],
        &["-comp", "lz4"],
        &["-comp", "gzip", "-b", "4096"],
        &["-comp", "zstd", "-b", "1048576"],
        &["-comp", "gzip", "-no-fragments"],
        &["-comp", "gzip", "-no-tailends"],
        &["-comp", "gzip", "-noI", "-noD", "-noF", "-noX"],
        &["-comp", "gzip", "-exports", "-no-duplicates"],
    ] {
        let image = sqfstar(dir.path(), &tar, options);
        let model = of_squashfs(&image);
        let mut found = plain(&model);
        found.remove("/").expect("a root");
        for (path, node) in &wanted {
            assert_eq!(found.get(path), Some(node), "{options:?}: {path}");
        }
        assert_eq!(found.len(), wanted.len(), "{options:?}");
        let sparse = model.get(&GuestPath::new("/usr/share/holes").expect("a path")).expect("there");
        assert!(
            matches!(&sparse.kind, EntryKind::File { spans, .. } if !spans.is_empty()) && sparse.data.len() < 3 << 20,
            "{options:?}: holes are lost"
        );
    }
}

#[test]
fn an_image_of_a_directory_has_its_owners_modes_and_attributes_and_those_of_the_root() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let dir = tempfile::tempdir().expect("a directory");
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    fs::create_dir_all(tree.join("a")).expect("made");
    fs::write(tree.join("a/file"), "content").expect("written");
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o751)).expect("changed");
    let name = |path: &str| tree.join(path).display().to_string();
    judge("chown", &["12345:54321", &name("a/file")]);
    judge("chmod", &["4711", &name("a/file")]);
    judge("setfattr", &["-n", "user.u", "-v", "value", &name("a/file")]);
    judge("setfattr", &["-n", "trusted.t", "-v", "0x00ff", &name("a")]);
    judge("mkfifo", &[&name("a/pipe")]);
    std::os::unix::net::UnixListener::bind(tree.join("a/socket")).expect("a socket");
    judge("mksquashfs", &[&name(""), image.to_str().expect("text"), "-quiet", "-no-progress", "-comp", "zstd"]);
    let model = of_squashfs(&image);
    // The filter of xz for programs, as distributions set it.
    let filtered = dir.path().join("filtered");
    judge("mksquashfs", &[&name(""), filtered.to_str().expect("text"), "-quiet", "-no-progress", "-comp", "xz", "-Xbcj", "x86"]);
    assert_eq!(plain(&of_squashfs(&filtered)), plain(&model));
    for (path, node) in model.iter() {
        let real = fs::symlink_metadata(tree.join(path.to_string().trim_start_matches('/'))).expect("there");
        let found = (node.meta.mode, node.meta.uid, node.meta.gid, node.meta.mtime.secs);
        assert_eq!(found, ((real.mode() & 0o7777) as u16, real.uid(), real.gid(), real.mtime()), "{path}");
    }
    let at = |path: &str| model.get(&GuestPath::new(path).expect("a path")).expect("there");
    assert_eq!(model.iter().count(), 5);
    assert_eq!((at("/").meta.mode, &at("/a/pipe").kind, &at("/a/socket").kind), (0o751, &EntryKind::Fifo, &EntryKind::Socket));
    let xattrs = |path: &str| at(path).meta.xattrs.iter().map(|xattr| (xattr.name.clone(), xattr.value.clone())).collect::<Vec<_>>();
    assert_eq!(xattrs("/a/file"), [(b"user.u".to_vec(), b"value".to_vec())]);
    assert_eq!(xattrs("/a"), [(b"trusted.t".to_vec(), b"\0\xff".to_vec())]);
}

#[test]
fn what_is_left_out_is_left_out_with_all_below_it_and_links_keep_their_data() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = sqfstar(dir.path(), &tarball(), &["-comp", "zstd"]);
    let mut model = Model::default();
    let filter = |path: &GuestPath| matches!(path.as_bytes(), b"/many" | b"/etc/third");
    let file = File::open(&image).expect("there");
    let summary = squashfs::read(&file, &Limits::default(), &filter, &mut model, &Progress::default()).expect("read");
    assert_eq!(summary.left_out, 2);
    assert!(model.iter().all(|(path, _)| !path.as_bytes().starts_with(b"/many")));
    assert_eq!(model.links(&GuestPath::new("/usr/bin/half").expect("a path")).len(), 2);
}

#[test]
fn limits_hold_and_other_compressors_and_versions_are_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let (tar, model) = (tarball(), |_: &GuestPath| false);
    let image = sqfstar(dir.path(), &tar, &["-comp", "gzip"]);
    let bytes = fs::read(&image).expect("there");
    let read =
        |bytes: &[u8], limits: Limits| squashfs::read(&bytes, &limits, &model, &mut Model::default(), &Progress::default()).expect_err("refused");
    for limits in [
        Limits { entries: 100, ..Limits::default() },
        Limits { depth: 1, ..Limits::default() },
        Limits { file_bytes: 1 << 20, ..Limits::default() },
        Limits { archive_bytes: 3 << 20, ..Limits::default() },
        Limits { xattr_value_bytes: 100, ..Limits::default() },
        Limits { xattr_total_bytes: 2000, ..Limits::default() },
        Limits { sparse_pairs: 0, ..Limits::default() },
    ] {
        let error = read(&bytes, limits.clone());
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "ARCHIVE_LIMIT"), "{limits:?}: {}", error.chain());
    }
    // Blocks that have nothing to do with content are paid for as well.
    let mut empty = tar::Builder::new(Vec::new());
    for number in 0..100u32 {
        member(&mut empty, &format!("file-{number:03}"), tar::EntryType::Regular, 0o644, b"");
    }
    let names = fs::read(sqfstar(dir.path(), &empty.into_inner().expect("a tarball"), &["-comp", "xz"])).expect("there");
    assert_eq!(read(&names, Limits { archive_bytes: 500, ..Limits::default() }).reason(), "ARCHIVE_LIMIT");
    let enough = Limits { archive_bytes: 20_000, ..Limits::default() };
    squashfs::read(&&names[..], &enough, &model, &mut Model::default(), &Progress::default()).expect("read once");
    let lzo = fs::read(sqfstar(dir.path(), &tar, &["-comp", "lzo"])).expect("there");
    let error = read(&lzo, Limits::default());
    assert_eq!((error.kind(), error.reason()), (Kind::Unsupported, "ARCHIVE_UNSUPPORTED"));
    assert!(error.chain().contains("lzo"));
    let mut old = bytes.clone();
    old[28] = 3;
    assert_eq!(read(&old, Limits::default()).kind(), Kind::Unsupported);
    let short = read(&bytes[..bytes.len() / 2], Limits::default());
    assert_eq!((short.kind(), short.reason()), (Kind::Corrupt, "ARCHIVE_TRUNCATED"));
}

/// Bytes that differ from an image anywhere: an error, or another tree; never a panic, and nothing without end.
#[test]
fn damaged_images_are_refused_or_read_as_something_and_never_worse() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut tar = tar::Builder::new(Vec::new());
    for dir in ["a", "a/b"] {
        member(&mut tar, dir, tar::EntryType::Directory, 0o755, b"");
    }
    tar.append_pax_extensions([("SCHILY.xattr.user.x", &b"y"[..])]).expect("appended");
    member(&mut tar, "a/b/c", tar::EntryType::Regular, 0o644, &[7; 10_000]);
    member(&mut tar, "a/d", tar::EntryType::Regular, 0o644, b"d");
    let tar = tar.into_inner().expect("a tarball");
    let limits = Limits { entries: 1000, file_bytes: 1 << 24, archive_bytes: 1 << 24, ..Limits::default() };
    let (mut refused, mut read) = (0, 0);
    for options in
        [&["-comp", "gzip"][..], &["-comp", "gzip", "-noI", "-noD", "-noF", "-noX"], &["-comp", "zstd"], &["-comp", "lz4"], &["-comp", "xz"]]
    {
        let bytes = fs::read(sqfstar(dir.path(), &tar, options)).expect("there");
        let end = u64::from_le_bytes(bytes[40..48].try_into().expect("eight")) as usize;
        for at in 0..end {
            for value in [0, 0xff, bytes[at] ^ 1, bytes[at] ^ 0x80] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                match squashfs::read(&&damaged[..], &limits, &|_| false, &mut Model::default(), &Progress::default()) {
                    Ok(_) => read += 1,
                    Err(error) => {
                        assert!(matches!(error.kind(), Kind::Corrupt | Kind::NoSpace | Kind::Unsupported), "{}", error.chain());
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 500 && read > 500, "{refused} {read}");
}

/// A root filesystem as tarball and as squashfs, through the whole daemon: two volumes that e2fsck passes and diff can't tell apart.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_squashfs_renders_like_one_of_a_tarball() {
    let dir = tempfile::tempdir().expect("a directory");
    let tar = server::tarball();
    let image = sqfstar(dir.path(), &tar, &["-comp", "xz"]);
    let squashed = fs::read(&image).expect("there");
    let mut daemon = Daemon::start().await;
    let mut trees = Vec::new();
    // As it is declared, and as its bytes say.
    for (name, bytes, media_type) in [("tar", &tar, None), ("declared", &squashed, Some("application/vnd.squashfs")), ("detected", &squashed, None)] {
        let digest = daemon.upload(bytes).await;
        let mut manifest = serde_json::json!({"name": name, "rootfs": {"digest": digest, "size": bytes.len()}});
        if let Some(media_type) = media_type {
            manifest["rootfs"]["media_type"] = media_type.into();
        }
        let image = daemon.image_of(&digest, &manifest.to_string()).await;
        let mut wanted = spec(&image, name, proto::VolumeFormat::Raw);
        let instance = wanted.instance.as_mut().expect("an instance");
        (instance.name, instance.hostname) = ("web".into(), "web.example.com".into());
        daemon.render(name, wanted).await;
        let volume = daemon.dir.join(format!("pool/{name}.raw")).display().to_string();
        judge("e2fsck", &["-fn", &volume]);
        let tree = dir.path().join(format!("tree-{name}"));
        fs::create_dir(&tree).expect("made");
        judge("debugfs", &["-R", &format!("rdump / {}", tree.display()), &volume]);
        trees.push(tree.display().to_string());
    }
    for other in &trees[1..] {
        // Host keys and seeds are drawn for each instance.
        let excluded = ["--exclude=applied_config", "--exclude=ssh_host_*", "--exclude=machine-id", "--exclude=random-seed"];
        judge("diff", &[&["-r", "--no-dereference"], &excluded[..], &[&trees[0], other]].concat());
    }
    // Declared as something else: refused. Other bytes behind the image, or it would be the golden that is there.
    let padded = [&squashed[..], &[0; 4096]].concat();
    let digest = daemon.upload(&padded).await;
    let wrong = serde_json::json!({"rootfs": {"digest": digest, "size": padded.len(), "media_type": "application/gzip"}});
    let image = daemon.image_of(&digest, &wrong.to_string()).await;
    let id = daemon.start_render("wrong", spec(&image, "wrong", proto::VolumeFormat::Raw)).await.expect("accepted").render.expect("a render").id;
    let ended = daemon.wait(&id).await;
    assert_eq!(ended.state(), RenderState::Failed);
    assert_eq!(ended.error.expect("why").reason, "FORMAT_MISMATCH");
    let mut damaged = squashed.clone();
    let end = damaged.len() - 4096.min(damaged.len() / 2);
    damaged.truncate(end);
    let digest = daemon.upload(&damaged).await;
    let image = daemon.image_of(&digest, "{}").await;
    let id = daemon.start_render("damaged", spec(&image, "damaged", proto::VolumeFormat::Raw)).await.expect("accepted").render.expect("a render").id;
    let ended = daemon.wait(&id).await;
    assert_eq!((ended.state(), ended.error.expect("why").reason.as_str()), (RenderState::Failed, "ARCHIVE_TRUNCATED"));
    daemon.stop().await;
}

/// A tree as images.linuxcontainers.org publishes split images: metadata, and a squashfs beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_split_image_of_a_simplestreams_tree_is_imported_and_renders() {
    let dir = tempfile::tempdir().expect("a directory");
    let (root, product) = (dir.path().join("tree"), "debian:bookworm:amd64:default");
    let place = "images/debian/bookworm/amd64/default/20261101_05:24";
    fs::create_dir_all(root.join("streams/v1")).expect("made");
    fs::create_dir_all(root.join(place)).expect("made");
    let squashed = fs::read(sqfstar(dir.path(), &server::tarball(), &["-comp", "xz"])).expect("there");
    let metadata = b"metadata";
    let fingerprint = Digest::of(&[&metadata[..], &squashed].concat()).hex();
    for (name, bytes) in [("incus.tar.xz", &metadata[..]), ("rootfs.squashfs", &squashed)] {
        fs::write(root.join(place).join(name), bytes).expect("written");
    }
    let item = |ftype: &str, name: &str, bytes: &[u8]| serde_json::json!({"ftype": ftype, "path": format!("{place}/{name}"), "sha256": Digest::of(bytes).hex(), "size": bytes.len()});
    let mut incus = item("incus.tar.xz", "incus.tar.xz", metadata);
    incus["combined_squashfs-sha256"] = fingerprint.as_str().into();
    let items = serde_json::json!({"incus.tar.xz": incus, "root.squashfs": item("squashfs", "rootfs.squashfs", &squashed)});
    let products = serde_json::json!({"format": "products:1.0", "content_id": "images", "datatype": "image-downloads", "updated": "Mon, 02 Nov 2026 10:00:00 +0000",
        "products": {product: {"aliases": "debian/bookworm,debian/12", "arch": "amd64", "os": "Debian", "release": "bookworm", "variant": "default",
            "versions": {"20261101_05:24": {"items": items}}}}});
    let index = serde_json::json!({"format": "index:1.0", "updated": "Mon, 02 Nov 2026 10:00:00 +0000", "index": {"images": {
        "datatype": "image-downloads", "format": "products:1.0", "path": "streams/v1/images.json", "products": [product], "updated": "Mon, 02 Nov 2026 10:00:00 +0000"}}});
    fs::write(root.join("streams/v1/images.json"), products.to_string()).expect("written");
    fs::write(root.join("streams/v1/index.json"), index.to_string()).expect("written");
    let stream = format!("[[stream]]\nname = 'lxc'\nurl = 'file://{}'\npolicy = 'unsigned'\n", root.display());
    let streams = cloudletd::config::Config::parse(&stream).expect("a configuration").streams;
    let mut daemon = Daemon::start_in(dir.path(), |config| config.streams = streams).await;
    daemon.catalogue.sync_stream(proto::SyncStreamRequest { stream: "lxc".into() }).await.expect("read");
    let request = proto::ImportStreamImageRequest { stream: "lxc".into(), product: product.into(), version: String::new() };
    let image =
        daemon.catalogue.import_stream_image(request).await.expect("imported").into_inner().image.expect("an image").image.expect("described");
    let manifest: serde_json::Value = serde_json::from_str(&image.manifest_json).expect("JSON");
    assert_eq!(manifest["x-simplestreams"]["fingerprint"], fingerprint);
    assert_eq!(manifest["rootfs"]["media_type"], "application/vnd.squashfs");
    daemon.render("a", spec(&image.id, "web1", proto::VolumeFormat::Raw)).await;
    judge("e2fsck", &["-fn", &daemon.dir.join("pool/web1.raw").display().to_string()]);
    daemon.stop().await;
}
