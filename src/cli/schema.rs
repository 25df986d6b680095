//! `barber schema`.

use super::Error;

pub(super) fn run() -> Result<(), Error> {
    // Two metrics of one name would be one in the schema.
    barber_metric::registered()?;
    println!("{:#}", crate::recipe::schema());
    Ok(())
}
