//! Sizes of memory and disks as people write them: `512M`, `4G`, `1GiB`, `65536`.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes.
///
/// Written as a whole number with an optional unit. Units are powers of 1024 and their case does
/// not matter: `K`, `M`, `G`, `T`, each also as `KiB`, `MiB`, ... . No unit means bytes.
/// `KB`, `MB`, ... are refused, because half of the world means 1000 by them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct MemorySize(u64);

const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// Why a text is not a size.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SizeError {
    /// No digits at its start.
    #[error("'{0}' is not a size: write a whole number and a unit, such as 512M or 4G")]
    NotANumber(String),
    /// Something unknown after the digits.
    #[error("'{0}' has an unknown unit: use K, M, G or T (powers of 1024), or none for bytes")]
    Unit(String),
    /// Does not fit 64 bits.
    #[error("'{0}' is too big: the largest size is 16777215T")]
    TooBig(String),
}

impl MemorySize {
    /// So many bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// So many MiB. A number over 2^44 wraps.
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// So many GiB. A number over 2^34 wraps.
    pub const fn gib(gib: u64) -> Self {
        Self(gib << 30)
    }

    /// The size in bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for MemorySize {
    /// The largest unit that divides it, so that parsing the text gives the same size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for MemorySize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let trimmed = text.trim();
        let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = trimmed.split_at(digits);
        if number.is_empty() {
            return Err(SizeError::NotANumber(text.into()));
        }
        let shift = match unit.trim().to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            unit => UNITS
                .iter()
                .find(|(name, _)| {
                    unit.strip_prefix(name).is_some_and(|r| r.is_empty() || r == "IB")
                })
                .map(|(_, shift)| *shift)
                .ok_or_else(|| SizeError::Unit(text.into()))?,
        };
        let too_big = || SizeError::TooBig(text.into());
        let number: u64 = number.parse().map_err(|_| too_big())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(too_big)
    }
}

impl Serialize for MemorySize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = MemorySize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 512M or 4G")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<MemorySize, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<MemorySize, E> {
                Ok(MemorySize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<MemorySize, E> {
                u64::try_from(bytes)
                    .map(MemorySize)
                    .map_err(|_| E::custom(SizeError::NotANumber(bytes.to_string())))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for MemorySize {
    fn schema_name() -> Cow<'static, str> {
        "MemorySize".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "title": "size",
            "pattern": "^[0-9]+ *([KMGTkmgt]([Ii][Bb])?|[Bb])?$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn people_write_sizes_in_many_ways() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("4G", 4 << 30),
            ("1GiB", 1 << 30),
            ("1 gib", 1 << 30),
            (" 64K ", 64 << 10),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(MemorySize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_told_why() {
        for text in ["", "M", "-1", "lots", ".5G"] {
            assert_eq!(text.parse::<MemorySize>(), Err(SizeError::NotANumber(text.into())));
        }
        for text in ["1MB", "1.5G", "3 pages", "1Mi"] {
            assert_eq!(text.parse::<MemorySize>(), Err(SizeError::Unit(text.into())));
        }
        for text in ["99999999999999999999", "16777216T"] {
            assert_eq!(text.parse::<MemorySize>(), Err(SizeError::TooBig(text.into())));
        }
        assert_eq!("16777215T".parse(), Ok(MemorySize(16777215 << 40)));
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(bytes: u64, shift in 0u32..63) {
            for size in [MemorySize(bytes), MemorySize(bytes >> shift << shift)] {
                prop_assert_eq!(size.to_string().parse(), Ok(size));
            }
        }

        #[test]
        fn no_text_panics(text in ".{0,12}") {
            let _ = text.parse::<MemorySize>();
        }
    }
}
