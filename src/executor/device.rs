//! Opening a GPU, and how much memory a run may take.

use sysinfo::System;

/// Opens an NVIDIA GPU, for products of this precision; returns it and the bytes of its free memory that
/// a run may take. Of the ranks on a machine, the first has the GPU of this number, and each other one the
/// next, as long as there are any; then they share them.
///
/// # Errors
/// If there is no driver, or no GPU of this number.
#[cfg(feature = "cuda")]
pub fn cuda(
    number: usize,
    precision: crate::precision::Precision,
    neighbours: crate::ranks::Neighbours,
) -> Result<(dfdx::tensor::Cuda, u64), String> {
    let open = || {
        // Without a driver, or a GPU of this number, the binding's own calls would panic.
        cudarc::driver::result::init().map_err(|e| format!("{e:?}"))?;
        let count = cudarc::driver::result::device::get_count().map_err(|e| format!("{e:?}"))?;
        if i32::try_from(number).map_or(true, |number| number >= count) {
            return Err(format!("the driver knows {count} GPUs, and counts from 0"));
        }
        let count = count as usize;
        let number = (number + neighbours.own) % count;
        super::ops::gpu::Gpu::open(number)?.set_precision(precision)?;
        let device = dfdx::tensor::Cuda::try_build(number, 0).map_err(|e| e.to_string())?;
        let (free, _) = cudarc::driver::result::mem_get_info().map_err(|e| format!("{e:?}"))?;
        Ok((device, free as u64 / neighbours.count.div_ceil(count) as u64 / 10 * 9))
    };
    open().map_err(|why: String| {
        format!("cuda:{number} cannot be opened: {why}. `nvidia-smi` lists the GPUs")
    })
}

/// Bytes of memory that are assumed to be free if the system does not tell, as in a sandbox without
/// /proc.
const ASSUMED: u64 = 8 << 30;

/// Bytes of memory that a run may take by default: most of what the machine has free, or of what
/// the control group allows.
pub fn available_memory() -> u64 {
    let mut system = System::new();
    system.refresh_memory();
    most_of(&system)
}

fn most_of(system: &System) -> u64 {
    if system.total_memory() == 0 {
        return ASSUMED;
    }
    let free = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    system.available_memory().min(free) / 10 * 9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_memory() {
        assert!(available_memory() > 1 << 20);
    }

    #[test]
    fn a_system_that_says_nothing_has_some_memory() {
        assert_eq!(most_of(&System::new()), ASSUMED);
    }
}
