//! What the fuzz targets share: golden ext4 images, how to damage them, and how to repair a tar archive.

pub mod damage;
pub mod goldens;
pub mod tar;
