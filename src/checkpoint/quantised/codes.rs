//! The values of codes of eight bits.

/// A code of eight bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::checkpoint) enum Codes {
    /// OCP's 8-bit floating-point format E4M3: a sign, 4 bits of exponent with the bias 7, 3 bits
    /// of mantissa, no infinities, and NaN where all bits after the sign are set.
    E4m3,
    /// Integers in two's complement.
    Int8,
    /// Integers plus 128.
    Offset,
}

static E4M3: [f32; 256] = table(Codes::E4m3);
static INT8: [f32; 256] = table(Codes::Int8);
static OFFSET: [f32; 256] = table(Codes::Offset);

impl Codes {
    /// The codes of a tensor of this format that is not packed; `None` if its elements are not
    /// codes of eight bits.
    pub(in crate::checkpoint) const fn of(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F8_E4M3 => Some(Self::E4m3),
            safetensors::Dtype::I8 => Some(Self::Int8),
            _ => None,
        }
    }

    /// The values of all codes, in order.
    pub(super) const fn values(self) -> &'static [f32; 256] {
        match self {
            Self::E4m3 => &E4M3,
            Self::Int8 => &INT8,
            Self::Offset => &OFFSET,
        }
    }
}

const fn table(codes: Codes) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = match codes {
            Codes::E4m3 => e4m3(code as u8),
            Codes::Int8 => code as u8 as i8 as f32,
            Codes::Offset => code as f32 - 128.0,
        };
        code += 1;
    }
    values
}

const fn e4m3(code: u8) -> f32 {
    let sign = (code as u32 >> 7) << 31;
    let (exponent, mantissa) = (code as u32 >> 3 & 0xf, code as u32 & 7);
    match (exponent, mantissa) {
        (0xf, 7) => f32::NAN,
        // Multiples of 2⁻⁹.
        (0, _) => f32::from_bits(sign | (mantissa as f32 / 512.0).to_bits()),
        _ => f32::from_bits(sign | (exponent + 127 - 7) << 23 | mantissa << 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The non-negative values of E4M3 in the order of their codes, as in table 2 of OCP's
    /// specification of 8-bit floating point, times 512; the last code is NaN.
    const MAGNITUDES: [u32; 127] = [
        0, 1, 2, 3, 4, 5, 6, 7, //
        8, 9, 10, 11, 12, 13, 14, 15, //
        16, 18, 20, 22, 24, 26, 28, 30, //
        32, 36, 40, 44, 48, 52, 56, 60, //
        64, 72, 80, 88, 96, 104, 112, 120, //
        128, 144, 160, 176, 192, 208, 224, 240, //
        256, 288, 320, 352, 384, 416, 448, 480, //
        512, 576, 640, 704, 768, 832, 896, 960, //
        1024, 1152, 1280, 1408, 1536, 1664, 1792, 1920, //
        2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840, //
        4096, 4608, 5120, 5632, 6144, 6656, 7168, 7680, //
        8192, 9216, 10_240, 11_264, 12_288, 13_312, 14_336, 15_360, //
        16_384, 18_432, 20_480, 22_528, 24_576, 26_624, 28_672, 30_720, //
        32_768, 36_864, 40_960, 45_056, 49_152, 53_248, 57_344, 61_440, //
        65_536, 73_728, 81_920, 90_112, 98_304, 106_496, 114_688, 122_880, //
        131_072, 147_456, 163_840, 180_224, 196_608, 212_992, 229_376,
    ];

    #[test]
    fn every_code_of_e4m3_has_its_value() {
        let values = Codes::E4m3.values();
        for (code, magnitude) in MAGNITUDES.iter().enumerate() {
            let expected = *magnitude as f32 / 512.0;
            assert_eq!(values[code].to_bits(), expected.to_bits(), "{code:#04x}");
            assert_eq!(values[code | 0x80].to_bits(), (-expected).to_bits(), "{code:#04x}");
        }
        assert!(values[0x7f].is_nan() && values[0xff].is_nan());
        assert_eq!([values[0x38], values[0x7e], values[0xfe]], [1.0, 448.0, -448.0]);
    }

    #[test]
    fn integers_have_signs_or_an_offset() {
        let [int8, offset] = [Codes::Int8, Codes::Offset].map(Codes::values);
        for i in -128_i16..128 {
            assert_eq!(int8[usize::from(i as u8)], f32::from(i));
            assert_eq!(offset[(i + 128) as usize], f32::from(i));
        }
    }
}
