//! Random edits against a model of the tree: what the model says is what the kernel and our reader see, and e2fsck finds nothing.

use std::collections::BTreeMap;

use cloudletd::fs::edit::{Attrs, EditOp};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use crate::support::*;

/// Random requests tried, over all feature sets.
const CASES: u32 = 45;

#[derive(Debug, Clone, PartialEq)]
enum Thing {
    Dir,
    File(Vec<u8>),
    Link(String),
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    thing: Thing,
    mode: u16,
    uid: u32,
    xattr: Option<Vec<u8>>,
}

/// The tree by path, without the root.
#[derive(Debug, Clone, Default)]
struct Model(BTreeMap<String, Entry>);

#[derive(Debug, Clone)]
enum Op {
    Write(String, usize, u16),
    Bulk(String, usize),
    Append(String, usize),
    Mkdir(String, u16),
    Symlink(String, usize),
    Remove(String),
    SetAttrs(String, u16, u32),
    SetXattr(String, Option<usize>),
    Rename(String, String),
}

fn parent(path: &str) -> Option<&str> {
    path.rfind('/').filter(|slash| *slash > 0).map(|slash| &path[..slash])
}

impl Model {
    fn is(&self, path: &str, want: fn(&Thing) -> bool) -> bool {
        self.0.get(path).is_some_and(|entry| want(&entry.thing))
    }

    /// Whether all that is there of a path's parents are directories; makes the missing ones.
    fn make_parents(&mut self, path: &str) -> bool {
        let mut missing = Vec::new();
        let mut at = path;
        while let Some(up) = parent(at) {
            match self.0.get(up) {
                Some(Entry { thing: Thing::Dir, .. }) => {}
                Some(_) => return false,
                None => missing.push(up.to_owned()),
            }
            at = up;
        }
        for up in missing {
            self.0.insert(up, Entry { thing: Thing::Dir, mode: 0o755, uid: 0, xattr: None });
        }
        true
    }

    fn put(&mut self, path: &str, thing: Thing, mode: u16) -> bool {
        let free = !self.is(path, |thing| *thing == Thing::Dir);
        let fits = free && self.make_parents(path);
        if fits {
            self.0.insert(path.to_owned(), Entry { thing, mode, uid: 0, xattr: None });
        }
        fits
    }

    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.0.retain(|name, _| name != path && !name.starts_with(&below));
    }

    fn rename(&mut self, from: &str, to: &str) -> bool {
        if !self.0.contains_key(from) || self.is(to, |thing| *thing == Thing::Dir) && from != to || to.starts_with(&format!("{from}/")) {
            return false;
        }
        if from == to {
            return true;
        }
        if !self.make_parents(to) {
            return false;
        }
        let below = format!("{from}/");
        let moved: Vec<String> = self.0.keys().filter(|name| *name == from || name.starts_with(&below)).cloned().collect();
        for name in moved {
            let entry = self.0.remove(&name).expect("listed");
            self.0.insert(format!("{to}{}", &name[from.len()..]), entry);
        }
        true
    }

    /// Applies an operation and gives it as edits; nothing when it does not apply (other tests are about errors).
    fn apply(&mut self, op: &Op) -> Vec<(String, EditOp)> {
        let before = self.clone();
        let mut edits = Vec::new();
        let done = match op {
            Op::Write(path, len, mode) => {
                let content = pattern(*len, *len as u8);
                edits.push((path.clone(), EditOp::WriteFile { content: content.clone(), attrs: Attrs::root(*mode) }));
                self.put(path, Thing::File(content), *mode)
            }
            Op::Bulk(dir, seed) => self.bulk(dir, *seed, &mut edits),
            Op::Append(path, len) => {
                let more = pattern(*len, 5);
                edits.push((path.clone(), append(more.clone())));
                match self.0.get_mut(path) {
                    Some(Entry { thing: Thing::File(content), .. }) => {
                        content.extend(more);
                        true
                    }
                    _ => false,
                }
            }
            Op::Mkdir(path, mode) => {
                edits.push((path.clone(), mkdir(*mode)));
                match self.0.get_mut(path) {
                    Some(entry) if entry.thing == Thing::Dir => {
                        (entry.mode, entry.uid) = (*mode, 0);
                        true
                    }
                    Some(_) => false,
                    None => self.put(path, Thing::Dir, *mode),
                }
            }
            Op::Symlink(path, len) => {
                let target = "t".repeat(*len);
                edits.push((path.clone(), link(&target)));
                self.put(path, Thing::Link(target), 0o777)
            }
            Op::Remove(path) => {
                edits.push((path.clone(), EditOp::Remove));
                self.remove(path);
                true
            }
            Op::SetAttrs(path, mode, uid) => {
                edits.push((path.clone(), EditOp::SetAttrs { mode: Some(*mode), owner: Some((*uid, 1)) }));
                self.0.get_mut(path).is_some_and(|entry| {
                    entry.uid = *uid;
                    if !matches!(entry.thing, Thing::Link(_)) {
                        entry.mode = *mode;
                    }
                    true
                })
            }
            Op::SetXattr(path, len) => {
                let value = len.map(|len| pattern(len, 2));
                edits.push((path.clone(), EditOp::SetXattr { name: b"trusted.p".to_vec(), value: value.clone() }));
                self.0.get_mut(path).is_some_and(|entry| {
                    entry.xattr = value;
                    true
                })
            }
            Op::Rename(from, to) => {
                edits.push((from.clone(), rename(to)));
                // A link on the way leads nowhere here.
                self.is_walkable(from) && self.rename(from, to)
            }
        };
        if done {
            return edits;
        }
        *self = before;
        Vec::new()
    }

    /// Enough files to fill some blocks of a directory.
    fn bulk(&mut self, dir: &str, seed: usize, edits: &mut Vec<(String, EditOp)>) -> bool {
        (0..70).all(|i| {
            let path = format!("{dir}/bulk-{}-{seed}-{i}", "b".repeat((seed + i) % 40));
            edits.push((path.clone(), write("b")));
            self.put(&path, Thing::File(b"b".to_vec()), 0o644)
        })
    }

    fn is_walkable(&self, path: &str) -> bool {
        parent(path).is_none_or(|up| self.is(up, |thing| *thing == Thing::Dir))
    }
}

fn paths() -> impl Strategy<Value = String> {
    let names = prop_oneof![Just("a".to_owned()), Just("b".into()), Just("c".into()), Just("d".repeat(200)), "[e-h]{1,2}".prop_map(|name| name)];
    prop::collection::vec(names, 1..4).prop_map(|names| format!("/{}", names.join("/")))
}

fn ops() -> impl Strategy<Value = Op> {
    let len = prop_oneof![4 => 0..200_usize, 2 => 900..9000_usize, 1 => 50_000..400_000_usize];
    let mode = prop_oneof![Just(0o644_u16), Just(0o4755), Just(0o1777), Just(0)];
    prop_oneof![
        6 => (paths(), len.clone(), mode.clone()).prop_map(|(path, len, mode)| Op::Write(path, len, mode)),
        1 => (paths(), 0..1000_usize).prop_map(|(path, seed)| Op::Bulk(path, seed)),
        4 => (paths(), len).prop_map(|(path, len)| Op::Append(path, len)),
        4 => (paths(), mode.clone()).prop_map(|(path, mode)| Op::Mkdir(path, mode)),
        2 => (paths(), 1..1000_usize).prop_map(|(path, len)| Op::Symlink(path, len)),
        2 => paths().prop_map(Op::Remove),
        2 => (paths(), mode, 0..200_000_u32).prop_map(|(path, mode, uid)| Op::SetAttrs(path, mode, uid)),
        3 => (paths(), prop::option::weighted(0.8, 0..700_usize)).prop_map(|(path, len)| Op::SetXattr(path, len)),
        3 => (paths(), paths()).prop_map(|(from, to)| Op::Rename(from, to)),
    ]
}

fn check(model: &Model, edited: &Edited) {
    let mount = edited.mount("ro");
    let mut seen = survey(mount.path());
    seen.remove("/");
    seen.retain(|path, _| !path.starts_with("/lost+found"));
    assert_eq!(seen.keys().collect::<Vec<_>>(), model.0.keys().collect::<Vec<_>>(), "the names in the tree");
    let image = edited.image();
    for (path, entry) in &model.0 {
        let kernel = &seen[path];
        let (kind, content) = match &entry.thing {
            Thing::Dir => (0o040_000, Vec::new()),
            Thing::File(content) => (0o100_000, content.clone()),
            Thing::Link(target) => (0o120_000, target.clone().into_bytes()),
        };
        assert_eq!((kernel.mode, kernel.owner.0), (kind | u32::from(entry.mode), entry.uid), "{path}");
        assert!(kernel.content == content, "{path}: content");
        let ino = image.lookup(&guest(path)).expect("lookup").unwrap_or_else(|| panic!("{path}: not found by us"));
        let ours = match &entry.thing {
            Thing::Dir => Vec::new(),
            Thing::File(_) => image.read_file(ino, 1 << 30).expect("read"),
            Thing::Link(_) => image.read_link(ino).expect("readlink"),
        };
        assert!(ours == content, "{path}: our reader");
        let mut value = vec![0; 4096];
        let got = rustix::fs::lgetxattr(mount.path().join(&path[1..]), "trusted.p", &mut value[..]).ok().map(|len| value[..len].to_vec());
        assert_eq!(got, entry.xattr, "{path}: xattr by the kernel");
        assert_eq!(image.xattrs(ino).expect("xattrs").pop().map(|xattr| xattr.value), entry.xattr, "{path}: xattr by us");
    }
    let mut count = 0;
    image
        .walk(&mut |_, _, _| {
            count += 1;
            Ok(())
        })
        .expect("walk");
    assert_eq!(count, model.0.len() + 2, "entries by our walk, with the root and lost+found");
}

#[test]
fn random_edits_leave_what_a_model_says() {
    let goldens: Vec<Golden> = FEATURE_SETS.iter().map(|(_, args)| Golden::make_with(args, "32M", |_| {})).collect();
    let strategy = (0..goldens.len(), prop::collection::vec(ops(), 1..60), prop::collection::vec(ops(), 1..60));
    let mut runner = TestRunner::new(Config { cases: CASES, max_shrink_iters: 60, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&strategy, |(set, first, second)| {
        let mut model = Model::default();
        let mut edited: Option<(Golden, Edited)> = None;
        for ops in [first, second] {
            let edits: Vec<(String, EditOp)> = ops.iter().flat_map(|op| model.apply(op)).collect();
            let request = request(edits.iter().map(|(path, op)| (path.as_str(), op.clone())).collect());
            // The second request edits what the first one left.
            let golden = match edited.take() {
                None => Golden::copy_of(&goldens[set].path),
                Some((_, before)) => Golden::copy_of(&before.path),
            };
            let after = golden.edited(&request);
            check(&model, &after);
            edited = Some((golden, after));
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
