//! Where matrices lie in a buffer of numbers.

/// The location of a matrix in a buffer of numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Offset of the first number.
    pub(super) start: usize,
    /// Distance from one row to the next.
    pub(super) stride: usize,
    /// Distance from one matrix to the next.
    pub(super) next: usize,
}

impl Place {
    /// The one matrix of rows of `width`, from a row on.
    pub(super) const fn rows(width: usize, first: usize) -> Self {
        Self { start: first * width, stride: width, next: 0 }
    }

    /// Count of numbers from the start to the end of the last of `count` matrices of [rows, columns].
    pub(super) const fn extent(&self, (rows, columns): (usize, usize), count: usize) -> usize {
        if rows == 0 || columns == 0 || count == 0 {
            return 0;
        }
        (count - 1) * self.next + (rows - 1) * self.stride + columns
    }

    /// Whether `count` matrices of [rows, columns] are within so many numbers.
    pub(super) const fn fits(
        &self,
        numbers: usize,
        (rows, columns): (usize, usize),
        count: usize,
    ) -> bool {
        if rows == 0 || columns == 0 {
            return self.start <= numbers;
        }
        columns <= self.stride && self.start + self.extent((rows, columns), count) <= numbers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_within_the_numbers() {
        // Three rows of two heads, side by side, of four numbers each; and one head after the
        // other.
        let beside = Place { start: 0, stride: 8, next: 4 };
        let after = Place { start: 0, stride: 4, next: 12 };
        for place in [beside, after] {
            assert!(place.fits(24, (3, 4), 2) && !place.fits(23, (3, 4), 2));
            let later = Place { start: 1, ..place };
            assert!(!later.fits(24, (3, 4), 2) && later.fits(24, (3, 3), 2));
        }
        assert_eq!((beside.extent((3, 4), 2), after.extent((3, 4), 1)), (24, 12));
        assert_eq!(after.extent((0, 4), 2), 0);
        assert!(!Place::rows(3, 0).fits(100, (2, 4), 1));
    }
}
