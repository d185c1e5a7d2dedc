//! The gRPC services: decode, call, encode. No decisions are made here.

pub mod audit;
pub mod authorise;
pub mod catalogue;
pub mod decode;
pub mod encode;
pub mod hosts;
pub mod images;
pub mod renders;
pub mod sharing;
pub mod status;
pub mod stores;
pub mod volumes;

use crate::error::{Error, Result, Stage};

/// Entries on a page when the caller does not say, and at most.
const PAGE_SIZE_DEFAULT: u32 = 100;
/// See [`PAGE_SIZE_DEFAULT`].
const PAGE_SIZE_MAX: u32 = 1000;

/// A page of a list: how many, and how many to skip. The token is the number to skip; lists are small and ordered by creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Entries wanted.
    pub size: u32,
    /// Entries to skip.
    pub offset: u64,
}

impl Page {
    /// Checks what the caller gave.
    pub fn new(size: u32, token: &str) -> Result<Page> {
        if size > PAGE_SIZE_MAX {
            return Err(Error::field(Stage::Request, "page_size", format!("{size} is more than {PAGE_SIZE_MAX}")));
        }
        let offset = if token.is_empty() {
            0
        } else {
            token.parse().map_err(|_| Error::field(Stage::Request, "page_token", "is not one that this daemon gave"))?
        };
        Ok(Page { size: if size == 0 { PAGE_SIZE_DEFAULT } else { size }, offset })
    }

    /// What to ask the catalogue for: one more than wanted, to know whether there are more.
    pub fn limit(&self) -> u32 {
        self.size + 1
    }

    /// Cuts a list to the page; the token is empty when that was all.
    pub fn cut<T>(&self, mut list: Vec<T>) -> (Vec<T>, String) {
        if list.len() > self.size as usize {
            list.truncate(self.size as usize);
            (list, (self.offset + u64::from(self.size)).to_string())
        } else {
            (list, String::new())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_continue_where_they_were_cut() {
        let page = Page::new(2, "").expect("valid");
        assert_eq!(page.limit(), 3);
        assert_eq!(page.cut(vec![1, 2, 3]), (vec![1, 2], "2".into()));
        let page = Page::new(2, "2").expect("valid");
        assert_eq!(page.cut(vec![3]), (vec![3], String::new()));
        assert!(Page::new(1001, "").is_err());
        assert!(Page::new(1, "x").is_err());
    }
}
