//! `dense`: every matrix as it is, with its zeros.

use super::Layout;

pub(super) static DENSE: Layout = Layout {
    name: "dense",
    help: "with their zeros, as any matrix",
    pattern: None,
    loading: include_str!("dense.md"),
    packing: None,
};
