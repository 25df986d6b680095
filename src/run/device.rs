//! The device that a run is on.

/// Calls a function with the device that a recipe names and the bytes of memory that it has free.
macro_rules! on_device {
    ($device:expr, $run:ident($($argument:expr),*)) => {
        match $device {
            $crate::executor::Device::Cpu => $run(
                dfdx::tensor::Cpu::default(),
                $crate::executor::available_memory(),
                $($argument),*
            ),
            #[cfg(feature = "cuda")]
            $crate::executor::Device::Cuda(number) => {
                match $crate::executor::cuda(number) {
                    Ok((device, memory)) => $run(device, memory, $($argument),*),
                    Err(problem) => Err($crate::run::Error::Device(problem).into()),
                }
            }
            #[cfg(not(feature = "cuda"))]
            $crate::executor::Device::Cuda(_) => Err($crate::run::Error::NoCuda.into()),
        }
    };
}
pub(crate) use on_device;
