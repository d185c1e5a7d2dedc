//! Where a file's blocks are: extent trees, and the direct and indirect blocks of files without the extents flag.

use std::collections::HashSet;

use super::{Image, Node, unsupported};
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{
            corrupt,
            extent::{Extent, ExtentHeader, ExtentIndex},
            get_u32,
            inode::flags,
        },
    },
};

/// The most separate runs of blocks one file may have; a bound for memory (24 MiB), hundreds of times what a real root filesystem has.
const RUNS_MAX: usize = 1 << 20;
/// Direct block numbers in `i_block`.
pub(crate) const DIRECT: u32 = 12;

/// All blocks of a file.
#[derive(Debug, Clone, Default)]
pub struct Mapping {
    /// Runs in file order, disjoint. Lengths are not limited to what one extent on disk can hold when the file has indirect blocks.
    pub runs: Vec<Extent>,
    /// Blocks that hold the map itself: extent nodes or indirect blocks.
    pub meta: Vec<u64>,
}

impl Mapping {
    /// Adds a written or unwritten run behind all others, joined to the last one where an extent (`len_max` blocks) can hold both.
    pub(crate) fn push(&mut self, run: Extent, len_max: u32) {
        if let Some(last) = self.runs.last_mut()
            && last.unwritten == run.unwritten
            && u64::from(last.block) + u64::from(last.len) == u64::from(run.block)
            && last.start + u64::from(last.len) == run.start
            && last.len <= len_max.saturating_sub(run.len)
        {
            last.len += run.len;
        } else {
            self.runs.push(run);
        }
    }

    /// The first file block behind all runs.
    pub(crate) fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| u64::from(run.block) + u64::from(run.len))
    }
}

impl Image {
    /// The disk block of one file block; nothing for a hole. `true` when it is written (an unwritten block reads as zeros).
    pub(crate) fn map_block(&self, node: &Node, logical: u32) -> Result<Option<(u64, bool)>> {
        if node.inode.flags & flags::EXTENTS == 0 {
            return Ok(self.map_indirect(node, logical)?.map(|block| (block, true)));
        }
        let seed = self.inode_seed(node);
        let (mut bytes, mut depth) = (node.inode.block.to_vec(), None);
        loop {
            let header = self.extent_header(node, &bytes, depth)?;
            let entries = usize::from(header.entries);
            if header.depth == 0 {
                let found = (0..entries)
                    .map(|i| Extent::get(&bytes, i))
                    .find(|run| run.block <= logical && u64::from(logical) < u64::from(run.block) + u64::from(run.len));
                let Some(run) = found else { return Ok(None) };
                self.check_run(node, &run)?;
                return Ok(Some((run.start + u64::from(logical - run.block), !run.unwritten)));
            }
            let below = (0..entries).map(|i| ExtentIndex::get(&bytes, i)).take_while(|index| index.block <= logical).last();
            let Some(index) = below else { return Ok(None) };
            bytes = self.extent_node(node, seed, index.leaf)?;
            depth = Some(header.depth - 1);
        }
    }

    /// All runs of a file (unwritten and beyond its size too).
    pub(crate) fn mapping(&self, node: &Node) -> Result<Mapping> {
        let mut mapping = Mapping::default();
        if node.inode.flags & flags::EXTENTS == 0 {
            self.indirect_mapping(node, &mut mapping)?;
        } else {
            let seed = self.inode_seed(node);
            self.extent_subtree(node, seed, &node.inode.block, None, (0, 1 << 32), &mut mapping)?;
        }
        Ok(mapping)
    }

    fn extent_header(&self, node: &Node, bytes: &[u8], depth: Option<u16>) -> Result<ExtentHeader> {
        let object = || format!("inode {}: extent tree", node.ino);
        let header = ExtentHeader::parse(bytes).map_err(|error| corrupt(object(), error.message().to_owned()))?;
        if depth.is_some_and(|depth| depth != header.depth) {
            return Err(corrupt(object(), format!("has a node of depth {} where {} belongs", header.depth, depth.unwrap_or_default())));
        }
        // An empty node would let a tree of any size map nothing.
        if header.entries == 0 && (depth.is_some() || header.depth > 0) {
            return Err(corrupt(object(), "has an empty node"));
        }
        Ok(header)
    }

    fn extent_node(&self, node: &Node, seed: u32, number: u64) -> Result<Vec<u8>> {
        let object = || format!("inode {}: extent block {number}", node.ino);
        if number <= u64::from(self.geo.first_data_block) {
            return Err(corrupt(object(), "is not a block for data"));
        }
        let bytes = self.block(number)?;
        let at = csum::extent_tail_at(&bytes);
        if self.sums == super::Sums::Metadata && at.is_none() {
            return Err(corrupt(object(), "has no room for its checksum"));
        }
        self.verify(object, || (at.map_or(0, |at| get_u32(&bytes, at)), csum::extent_block(seed, &bytes).unwrap_or(0)))?;
        Ok(bytes.to_vec())
    }

    fn check_run(&self, node: &Node, run: &Extent) -> Result<()> {
        let end = run.start.checked_add(u64::from(run.len));
        if run.len == 0
            || run.start <= u64::from(self.geo.first_data_block)
            || end.is_none_or(|end| end > self.geo.blocks_count)
            || u64::from(run.block) + u64::from(run.len) > 1 << 32
        {
            return Err(corrupt(format!("inode {}", node.ino), format!("maps {} blocks at block {}, outside the filesystem", run.len, run.start)));
        }
        Ok(())
    }

    /// Adds what lies below one node; `range` is the part of the file that its parent gives it. Disjoint ranges and the rule against empty
    /// nodes keep the walk finite: depth shrinks, and a block that appears twice can't satisfy two ranges.
    fn extent_subtree(&self, node: &Node, seed: u32, bytes: &[u8], depth: Option<u16>, range: (u64, u64), mapping: &mut Mapping) -> Result<()> {
        let header = self.extent_header(node, bytes, depth)?;
        let entries = usize::from(header.entries);
        let outside = || corrupt(format!("inode {}: extent tree", node.ino), "has entries out of order");
        if header.depth == 0 {
            for run in (0..entries).map(|i| Extent::get(bytes, i)) {
                self.check_run(node, &run)?;
                let (start, end) = (u64::from(run.block), u64::from(run.block) + u64::from(run.len));
                if start < mapping.end() || start < range.0 || end > range.1 {
                    return Err(outside());
                }
                self.add_run(node, mapping, run)?;
            }
            return Ok(());
        }
        for i in 0..entries {
            let index = ExtentIndex::get(bytes, i);
            let end = if i + 1 < entries { u64::from(ExtentIndex::get(bytes, i + 1).block) } else { range.1 };
            if u64::from(index.block) < range.0 || end <= u64::from(index.block) || end > range.1 {
                return Err(outside());
            }
            let child = self.extent_node(node, seed, index.leaf)?;
            mapping.meta.push(index.leaf);
            self.extent_subtree(node, seed, &child, Some(header.depth - 1), (index.block.into(), end), mapping)?;
        }
        Ok(())
    }

    fn add_run(&self, node: &Node, mapping: &mut Mapping, run: Extent) -> Result<()> {
        if mapping.runs.len() >= RUNS_MAX {
            return Err(unsupported(format!("inode {}", node.ino), format!("a file in more than {RUNS_MAX} pieces")));
        }
        mapping.runs.push(run);
        Ok(())
    }

    /// Block numbers in an indirect block.
    pub(crate) fn addresses_per_block(&self) -> u32 {
        self.geo.block_size / 4
    }

    /// How a file block is reached without extents: which of the 15 words of `i_block`, then the index in each indirect block.
    pub(crate) fn indirect_path(&self, logical: u32) -> Option<(usize, Vec<usize>)> {
        let per = u64::from(self.addresses_per_block());
        let mut rest = u64::from(logical);
        if rest < u64::from(DIRECT) {
            return Some((rest as usize, Vec::new()));
        }
        rest -= u64::from(DIRECT);
        for level in 1..=3_u32 {
            let span = per.pow(level);
            if rest < span {
                let path = (0..level).rev().map(|l| (rest / per.pow(l) % per) as usize).collect();
                return Some((DIRECT as usize - 1 + level as usize, path));
            }
            rest -= span;
        }
        None
    }

    fn map_indirect(&self, node: &Node, logical: u32) -> Result<Option<u64>> {
        let Some((slot, path)) = self.indirect_path(logical) else { return Ok(None) };
        let mut number = get_u32(&node.inode.block, slot * 4);
        for index in path {
            if number == 0 {
                return Ok(None);
            }
            let block = self.block(self.check_pointer(node, number)?)?;
            number = get_u32(&block, index * 4);
        }
        if number == 0 { Ok(None) } else { self.check_pointer(node, number).map(Some) }
    }

    fn check_pointer(&self, node: &Node, number: u32) -> Result<u64> {
        let number = u64::from(number);
        if number <= u64::from(self.geo.first_data_block) || number >= self.geo.blocks_count {
            return Err(corrupt(format!("inode {}", node.ino), format!("points to block {number}, outside the filesystem")));
        }
        Ok(number)
    }

    fn indirect_mapping(&self, node: &Node, mapping: &mut Mapping) -> Result<()> {
        let mut seen = HashSet::new();
        for slot in 0..15 {
            let number = get_u32(&node.inode.block, slot as usize * 4);
            let level = (slot + 1_u32).saturating_sub(DIRECT);
            let first = match level {
                0 => u64::from(slot),
                _ => u64::from(DIRECT) + (1..level).map(|l| u64::from(self.addresses_per_block()).pow(l)).sum::<u64>(),
            };
            self.indirect_subtree(node, number, level, first, &mut seen, mapping)?;
        }
        Ok(())
    }

    /// `seen` holds the indirect blocks met so far: one that appears twice would let a small image map without end.
    fn indirect_subtree(&self, node: &Node, number: u32, level: u32, first: u64, seen: &mut HashSet<u64>, mapping: &mut Mapping) -> Result<()> {
        if number == 0 {
            return Ok(());
        }
        let number = self.check_pointer(node, number)?;
        let logical = u32::try_from(first).map_err(|_| corrupt(format!("inode {}", node.ino), "maps more than 2^32 blocks"))?;
        if level == 0 {
            let run = Extent { block: logical, len: 1, start: number, unwritten: false };
            let pieces = mapping.runs.len();
            mapping.push(run, u32::MAX);
            if pieces == RUNS_MAX && mapping.runs.len() > RUNS_MAX {
                return Err(unsupported(format!("inode {}", node.ino), format!("a file in more than {RUNS_MAX} pieces")));
            }
            return Ok(());
        }
        if !seen.insert(number) {
            return Err(corrupt(format!("inode {}", node.ino), format!("uses indirect block {number} twice")));
        }
        mapping.meta.push(number);
        let block = self.block(number)?;
        let span = u64::from(self.addresses_per_block()).pow(level - 1);
        for i in 0..self.addresses_per_block() {
            self.indirect_subtree(node, get_u32(&block, i as usize * 4), level - 1, first + u64::from(i) * span, seen, mapping)?;
        }
        Ok(())
    }
}
