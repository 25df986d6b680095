//! The matrix product of the CPU, over the `gemm` crate: with AVX-512 it runs at the machine's
//! peak, where dfdx's own product reaches half of it.

use gemm::Parallelism;

/// A matrix in a slice: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// A contiguous row-major matrix.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// A row-major matrix whose rows are `row_stride` elements apart.
    pub(super) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(columns <= row_stride && fits(data.len(), rows, columns, row_stride));
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose, of the same data.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

fn fits(len: usize, rows: usize, columns: usize, row_stride: usize) -> bool {
    rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= len
}

/// Whether a product may use several threads: inside a parallel loop it must not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    One,
    All,
}

/// out = beta · out + alpha · a b, with `out` row-major, its rows `row_stride` elements apart.
pub(super) fn gemm(
    out: &mut [f32],
    row_stride: usize,
    beta: f32,
    alpha: f32,
    a: View<'_>,
    b: View<'_>,
    threads: Threads,
) {
    assert_eq!(a.columns, b.rows);
    assert!(b.columns <= row_stride && fits(out.len(), a.rows, b.columns, row_stride));
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    #[allow(unsafe_code, reason = "the gemm crate's interface is raw pointers")]
    // SAFETY: each view holds its last element (checked when it was made, and above for `out`),
    // and `out` is borrowed mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_strided_and_transposed_views() {
        let a = [1.0, 2.0, 9.0, 3.0, 4.0, 9.0]; // [[1, 2], [3, 4]] with stride 3
        let b = [5.0, 6.0, 7.0, 8.0]; // [[5, 6], [7, 8]]
        let mut out = [1.0; 4];
        gemm(&mut out, 2, 0.0, 1.0, View::strided(&a, 2, 2, 3), View::new(&b, 2, 2), Threads::One);
        assert_eq!(out, [19.0, 22.0, 43.0, 50.0]);
        gemm(
            &mut out,
            2,
            1.0,
            2.0,
            View::strided(&a, 2, 2, 3),
            View::new(&b, 2, 2).t(),
            Threads::All,
        );
        assert_eq!(out, [19.0 + 34.0, 22.0 + 46.0, 43.0 + 78.0, 50.0 + 106.0]);
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn a_view_beyond_its_data_is_refused() {
        View::new(&[0.0; 5], 2, 3);
    }
}
