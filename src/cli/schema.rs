//! `barber schema`.

use super::Error;

pub(super) fn run() -> Result<(), Error> {
    // Two metrics with the same name are an error.
    barber_metric::registered()?;
    println!("{:#}", crate::recipe::schema());
    Ok(())
}
