//! POSIX access control lists: the text of `SCHILY.acl.*` (acl(5), "ACL text forms") to the binary value of `system.posix_acl_access` and
//! `system.posix_acl_default` (include/uapi/linux/posix_acl_xattr.h), and the checks that the kernel makes (fs/posix_acl.c, `posix_acl_valid`).
//!
//! Names of users and groups are refused unless a number stands beside them: resolving them needs the guest's user database, which may not be
//! complete before the archive has ended, and leaving such an entry out would change who may read the file.

use super::Refusal;

const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;

/// Entries of one list; ext4 fits about 500 in a block.
const ENTRIES_MAX: usize = 1024;

/// Tags in the order in which the kernel wants them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
enum Tag {
    UserObj = 0x01,
    User = 0x02,
    GroupObj = 0x04,
    Group = 0x08,
    Mask = 0x10,
    Other = 0x20,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct AclEntry {
    tag: Tag,
    id: u32,
    perm: u16,
}

/// A checked list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Acl(Vec<AclEntry>);

impl Acl {
    /// Reads the text form: entries separated by commas or newlines, each `tag:qualifier:permissions`, with star's number as a fourth field.
    pub(super) fn from_text(text: &[u8]) -> Result<Acl, Refusal> {
        let text = std::str::from_utf8(text).map_err(|_| Refusal::corrupt("the access control list is not UTF-8"))?;
        let mut entries = Vec::new();
        for line in text.split(['\n', ',']) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if !line.is_empty() {
                entries.push(entry_of_text(line)?);
            }
        }
        Acl(entries).checked()
    }

    /// Reads the value of the attribute.
    pub(super) fn from_xattr(value: &[u8]) -> Result<Acl, Refusal> {
        let bad = || Refusal::corrupt("the value of a system.posix_acl attribute is not an access control list of version 2");
        let (version, rest) = value.split_first_chunk::<4>().ok_or_else(bad)?;
        if u32::from_le_bytes(*version) != VERSION || rest.len() % 8 != 0 {
            return Err(bad());
        }
        let mut entries = Vec::new();
        for bytes in rest.chunks_exact(8) {
            let tag = match u16::from_le_bytes([bytes[0], bytes[1]]) {
                0x01 => Tag::UserObj,
                0x02 => Tag::User,
                0x04 => Tag::GroupObj,
                0x08 => Tag::Group,
                0x10 => Tag::Mask,
                0x20 => Tag::Other,
                _ => return Err(bad()),
            };
            let perm = u16::from_le_bytes([bytes[2], bytes[3]]);
            let id = match tag {
                Tag::User | Tag::Group => u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
                _ => NO_ID,
            };
            if perm > 7 {
                return Err(bad());
            }
            entries.push(AclEntry { tag, id, perm });
        }
        Acl(entries).checked()
    }

    /// The value of the attribute.
    pub(super) fn to_xattr(&self) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            value.extend_from_slice(&(entry.tag as u16).to_le_bytes());
            value.extend_from_slice(&entry.perm.to_le_bytes());
            value.extend_from_slice(&entry.id.to_le_bytes());
        }
        value
    }

    /// Whether it says no more than the mode does; the kernel stores no access list then. A default list stands even so.
    pub(super) fn is_minimal(&self) -> bool {
        self.0.len() <= 3
    }

    /// The mode that goes with the list: its owner, mask (or group) and other entries are the nine permission bits.
    pub(super) fn mode(&self, mode: u16) -> u16 {
        let perm = |tag| self.0.iter().find(|entry| entry.tag == tag).map(|entry| entry.perm);
        let group = perm(Tag::Mask).or(perm(Tag::GroupObj)).unwrap_or(0);
        (mode & !0o777) | perm(Tag::UserObj).unwrap_or(0) << 6 | group << 3 | perm(Tag::Other).unwrap_or(0)
    }

    fn checked(mut self) -> Result<Acl, Refusal> {
        if self.0.len() > ENTRIES_MAX {
            return Err(Refusal::limit(format!("an access control list has {} entries, the limit is {ENTRIES_MAX}", self.0.len())));
        }
        self.0.sort_unstable();
        let count = |tag| self.0.iter().filter(|entry| entry.tag == tag).count();
        let named = count(Tag::User) + count(Tag::Group);
        let once = [Tag::UserObj, Tag::GroupObj, Tag::Other].into_iter().all(|tag| count(tag) == 1);
        if !once || count(Tag::Mask) > 1 || (named > 0 && count(Tag::Mask) == 0) {
            return Err(Refusal::corrupt("an access control list must have owner, group and other once, and a mask when it names anybody"));
        }
        if self.0.windows(2).any(|pair| pair[0].tag == pair[1].tag && pair[0].id == pair[1].id) {
            return Err(Refusal::corrupt("an access control list names somebody twice"));
        }
        if self.0.iter().any(|entry| matches!(entry.tag, Tag::User | Tag::Group) && entry.id == NO_ID) {
            return Err(Refusal::corrupt("an access control list names an impossible user or group number"));
        }
        Ok(self)
    }
}

fn entry_of_text(line: &str) -> Result<AclEntry, Refusal> {
    let bad = || Refusal::corrupt(format!("{line:?} is not an entry of an access control list"));
    let fields: Vec<&str> = line.split(':').map(str::trim).collect();
    // mask:rwx and other:rwx may come without the empty qualifier.
    let (tag, qualifier, perm, extra) = match fields[..] {
        [tag @ ("mask" | "m" | "other" | "o"), perm] => (tag, "", perm, None),
        [tag, qualifier, perm] => (tag, qualifier, perm, None),
        [tag, qualifier, perm, extra] => (tag, qualifier, perm, Some(extra)),
        _ => return Err(bad()),
    };
    let tag = match (tag, qualifier.is_empty()) {
        ("user" | "u", true) => Tag::UserObj,
        ("user" | "u", false) => Tag::User,
        ("group" | "g", true) => Tag::GroupObj,
        ("group" | "g", false) => Tag::Group,
        ("mask" | "m", true) => Tag::Mask,
        ("other" | "o", true) => Tag::Other,
        _ => return Err(bad()),
    };
    let id = match tag {
        Tag::User | Tag::Group => named_id(qualifier, extra)?,
        _ => NO_ID,
    };
    Ok(AclEntry { tag, id, perm: permissions(perm).ok_or_else(bad)? })
}

fn named_id(qualifier: &str, extra: Option<&str>) -> Result<u32, Refusal> {
    let number = extra.unwrap_or(qualifier);
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| number.parse().ok()).flatten().ok_or_else(|| {
        Refusal::unsupported(format!("an access control list names {qualifier:?}, which is only known to the guest's user database"))
            .reason("ACL_NAME")
            .hint("make the archive with numbers: tar --acls --numeric-owner")
    })
}

fn permissions(text: &str) -> Option<u16> {
    let mut perm = 0;
    for letter in text.bytes() {
        perm |= match letter {
            b'r' => 4,
            b'w' => 2,
            b'x' => 1,
            b'-' => 0,
            _ => return None,
        };
    }
    (1..=3).contains(&text.len()).then_some(perm)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BINARY: [u8; 44] = [
        2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 5, 0, 232, 3, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255, 16, 0, 7, 0, 255, 255, 255, 255, 32, 0,
        0, 0, 255, 255, 255, 255,
    ];

    #[test]
    fn the_text_forms_of_gnu_tar_and_star_give_the_kernels_value() {
        for text in [
            "user::rwx\nuser:1000:r-x\ngroup::r-x\nmask::rwx\nother::---\n",
            "user::rwx,user:joe:r-x:1000,group::r-x,mask::rwx,other::---",
            "o:---,m:rwx,g::r-x,u:1000:rx\t#effective:r-x,u::rwx",
        ] {
            let acl = Acl::from_text(text.as_bytes()).unwrap_or_else(|refusal| panic!("{text}: {refusal:?}"));
            assert_eq!(acl.to_xattr(), BINARY, "{text}");
            assert!(!acl.is_minimal());
            assert_eq!(acl.mode(0o4644), 0o4770, "{text}");
            assert_eq!(Acl::from_xattr(&BINARY).ok(), Some(acl));
        }
    }

    #[test]
    fn a_list_that_says_no_more_than_the_mode_is_minimal() {
        let acl = Acl::from_text(b"user::rw-,group::r--,other::r--").expect("valid");
        assert!(acl.is_minimal());
        assert_eq!(acl.mode(0), 0o644);
        assert_eq!(acl.to_xattr().len(), 28);
    }

    #[test]
    fn names_without_numbers_are_refused_with_a_way_out() {
        let refusal = Acl::from_text(b"user::rwx,group::r-x,group:adm:r-x,mask::r-x,other::---").expect_err("a name");
        assert!(refusal.at(0, "x").hint().is_some_and(|hint| hint.contains("--numeric-owner")));
    }

    #[test]
    fn lists_that_the_kernel_would_refuse_are_refused() {
        for text in [
            "",
            "user::rwx",
            "user::rwx,group::r-x,other::---,user:5:r--",
            "user::rwx,user::rwx,group::r-x,other::---",
            "user::rwx,user:5:r--,user:5:rwx,group::r-x,mask::rwx,other::---",
            "user::rwx,user:4294967295:r--,group::r-x,mask::rwx,other::---",
            "user::rwq,group::r-x,other::---",
            "user::rwx,group::r-x,other:5:---",
        ] {
            assert!(Acl::from_text(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Acl::from_xattr(&BINARY[..43]).is_err());
        assert!(Acl::from_xattr(&[1, 0, 0, 0]).is_err());
    }
}
