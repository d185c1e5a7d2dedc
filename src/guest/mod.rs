//! Injection: what makes an instance out of an image, as pure data.

pub mod facts;
