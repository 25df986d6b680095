//! The command `barber`.

fn main() {}
