//! The CUDA kernels. NVRTC compiles them without a GPU, but a driver's library has to be there.

/// Each of them, with the types of its parameters.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda, and a CUDA driver's library")]
fn kernels_compile() {
    #[cfg(feature = "cuda")]
    {
        let source = llm_barber::executor::ops::kernel_source();
        for expected in [
            "void add(index_t n, const float *a, const float *b, float *y) {",
            "void scatter(index_t n, const index_t *places, const float *values, float *y) {",
        ] {
            assert!(source.contains(expected), "{expected}");
        }
        if let Err(problem) = cudarc::nvrtc::compile_ptx(source) {
            panic!("{problem}");
        }
    }
}
