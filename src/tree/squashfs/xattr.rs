//! Extended attributes: an index of sets, each a run of pairs; a large value is stored once and referred to.

use super::{
    super::{Xattr, archive::Limits},
    Checked, Refusal,
    inode::NONE,
    table::{Fields, Image},
};

/// Attributes of one inode: their names alone could not be listed beyond some thousands (`XATTR_LIST_MAX`).
const COUNT_MAX: u32 = 1024;
/// The value is elsewhere.
const OUT_OF_LINE: u16 = 0x100;

impl Image<'_> {
    /// The attributes with that number, sorted; and how many there were that have no place on Linux.
    pub(super) fn xattrs(&mut self, number: u32, limits: &Limits) -> Checked<(Vec<Xattr>, u64)> {
        if number == NONE {
            return Ok((Vec::new(), 0));
        }
        let table = self.xattr_table.filter(|table| number < table.count);
        let table = table.ok_or_else(|| Refusal::corrupt(format!("extended attributes number {number}, which are not there")))?;
        let entry = self.entry::<16>(table.index, number)?;
        let mut fields = Fields(&entry);
        let (reference, count) = (fields.u64()?, fields.u32()?);
        if count > COUNT_MAX {
            return Err(Refusal::limit(format!("{count} extended attributes, the limit is {COUNT_MAX}")));
        }
        let mut cursor = self.cursor(table.pairs, reference)?;
        let (mut xattrs, mut total, mut dropped) = (Vec::new(), 0, 0);
        for _ in 0..count {
            let header = self.take_array::<4>(&mut cursor)?;
            let mut fields = Fields(&header);
            let (kind, name_len) = (fields.u16()?, usize::from(fields.u16()?));
            let mut name = vec![0; name_len];
            self.take(&mut cursor, &mut name)?;
            let len = u32::from_le_bytes(self.take_array(&mut cursor)?);
            let value = if kind & OUT_OF_LINE != 0 {
                if len != 8 {
                    return Err(Refusal::corrupt(format!("a reference of {len} bytes to a value")));
                }
                let reference = u64::from_le_bytes(self.take_array(&mut cursor)?);
                let mut there = self.cursor(table.pairs, reference)?;
                let len = u32::from_le_bytes(self.take_array(&mut there)?);
                self.value(&mut there, len, limits)?
            } else {
                self.value(&mut cursor, len, limits)?
            };
            let prefix: &[u8] = match kind & !OUT_OF_LINE {
                0 => b"user.",
                1 => b"trusted.",
                2 => b"security.",
                _ => {
                    dropped += 1;
                    continue;
                }
            };
            let name = [prefix, &name].concat();
            if name.len() == prefix.len() || name.len() > 255 || name.contains(&0) {
                return Err(Refusal::corrupt(format!("the extended attribute {:?}", String::from_utf8_lossy(&name))));
            }
            total += name.len() + value.len();
            if total > limits.xattr_total_bytes {
                return Err(Refusal::limit(format!("the extended attributes have more than {} bytes", limits.xattr_total_bytes)));
            }
            xattrs.push(Xattr { name, value });
        }
        xattrs.sort_unstable();
        if xattrs.windows(2).any(|two| two[0].name == two[1].name) {
            return Err(Refusal::corrupt("an extended attribute is there twice"));
        }
        Ok((xattrs, dropped))
    }

    fn value(&mut self, cursor: &mut super::table::Cursor, len: u32, limits: &Limits) -> Checked<Vec<u8>> {
        let len = len as usize;
        if len > limits.xattr_value_bytes {
            return Err(Refusal::limit(format!("an extended attribute of {len} bytes, the limit is {}", limits.xattr_value_bytes)));
        }
        let mut value = vec![0; len];
        self.take(cursor, &mut value)?;
        Ok(value)
    }
}
