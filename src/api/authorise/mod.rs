//! Who may do what. Default is deny.
//!
//! ```text
//! connection ─ identity ─ rules ─▶ Peer {identity, grants}      once per connection: SO_PEERCRED (unix(7)) or the client's certificate,
//!                                                                which is verified again when authorities or revocations change
//! call ─ layer ─ table: the method's role ─▶ Caller             every call of every service, also health and reflection; what is not in the table is refused
//!                   rate: calls a second of the owner; audit: what was denied, what changes something
//! service ─ Caller::check_pool, Caller::sees                    where the pool is known
//! ```
//!
//! A service that looks for the [`Caller`] of a request that did not pass the layer finds none, and refuses. A pool that a caller may not use is refused by
//! name (POOL_NOT_ALLOWED) whether it exists or not; a render or volume that is found by an id of its own and lies in such a pool is NOT_FOUND, and lists
//! leave it out. What has no pool (images, golden images, renders of golden images alone) is everybody's who may read.

mod caller;
mod identity;
mod layer;
mod rate;
mod rules;
pub mod table;

pub use caller::{Caller, Notes, Peer, StillGood};
pub use identity::{Certificate, Identity};
pub use layer::{AccessLayer, AccessService};
pub use rate::Rates;
pub use rules::{Grants, Rules};
