//! The serde deserializers: one for a whole text, one for all values of a key, one for one value.

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, IntoDeserializer, Visitor};

use super::Error;
use super::items::Item;

/// The whole text, or the content of an enum's variant.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    pub items: &'a [Item],
}

impl Text<'_> {
    /// The text as one value, with no items in it.
    fn single(&self) -> Result<String, Error> {
        match self.items {
            [item] => Ok(item.whole()),
            [] => Err(Error("a value is missing".into())),
            [_, second, ..] => Err(Error(format!(
                "'{}' is too much here; to have a comma in a value, quote it: \"a,b\"",
                second.whole()
            ))),
        }
    }
}

/// Forwards the methods that want a single value to [`Value`].
macro_rules! forward_to_value {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            Value { text: Some(&self.single()?) }.$method(visitor)
        })*
    };
}

impl<'de> de::Deserializer<'de> for Text<'_> {
    type Error = Error;

    forward_to_value! {
        deserialize_any deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32
        deserialize_i64 deserialize_i128 deserialize_u8 deserialize_u16 deserialize_u32
        deserialize_u64 deserialize_u128 deserialize_f32 deserialize_f64 deserialize_char
        deserialize_str deserialize_string deserialize_bytes deserialize_byte_buf
        deserialize_identifier deserialize_seq deserialize_unit
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Fields::new(self.items, &[])?)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Fields::new(self.items, fields)?)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let (first, rest) = self.items.split_first().ok_or(Error("a value is missing".into()))?;
        // `tap=NAME,mac=M` is the variant `tap` with the content `NAME,mac=M`.
        let value = first.value.clone().map(|value| Item { key: None, value: Some(value) });
        let content = value.into_iter().chain(rest.iter().cloned()).collect();
        let variant = first.key.as_deref().unwrap_or(first.value.as_deref().unwrap_or_default());
        visitor.visit_enum(Variant { name: variant, content })
    }
}

/// The items of a struct, grouped by key in the order of their first appearance.
struct Fields {
    groups: std::vec::IntoIter<(String, Vec<Option<String>>)>,
    values: Vec<Option<String>>,
    key: String,
}

impl Fields {
    /// `fields` are the struct's own, the first of which a lone first value is for.
    fn new(items: &[Item], fields: &[&str]) -> Result<Self, Error> {
        let mut groups: Vec<(String, Vec<Option<String>>)> = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let lone = match (&item.key, &item.value) {
                (None, _) => true,
                (Some(key), None) => !fields.contains(&key.as_str()),
                (Some(_), Some(_)) => false,
            };
            let (key, value) = match fields.first() {
                Some(first) if index == 0 && lone => ((*first).to_owned(), Some(item.whole())),
                _ => (item.key()?.to_owned(), item.value.clone()),
            };
            match groups.iter_mut().find(|(name, _)| *name == key) {
                Some((_, values)) => values.push(value),
                None => groups.push((key, vec![value])),
            }
        }
        Ok(Self { groups: groups.into_iter(), values: Vec::new(), key: String::new() })
    }
}

impl<'de> de::MapAccess<'de> for Fields {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((key, values)) = self.groups.next() else { return Ok(None) };
        self.values = values;
        self.key = key;
        let key: StrDeserializer<'_, Error> = self.key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let values = std::mem::take(&mut self.values);
        seed.deserialize(Values { values: &values })
            .map_err(|Error(message)| Error(format!("{}: {message}", self.key)))
    }
}

/// All values that a key has.
#[derive(Clone, Copy)]
struct Values<'a> {
    values: &'a [Option<String>],
}

impl<'a> Values<'a> {
    fn single(&self) -> Result<Value<'a>, Error> {
        match self.values {
            [value] => Ok(Value { text: value.as_deref() }),
            _ => Err(Error("is given twice".into())),
        }
    }
}

/// Forwards methods to the key's only value.
macro_rules! forward_to_single {
    ($($method:ident ( $($arg:ident : $type:ty),* ))*) => {
        $(fn $method<V: Visitor<'de>>(self, $($arg: $type,)* visitor: V) -> Result<V::Value, Error> {
            self.single()?.$method($($arg,)* visitor)
        })*
    };
}

impl<'de> de::Deserializer<'de> for Values<'_> {
    type Error = Error;

    forward_to_single! {
        deserialize_any() deserialize_bool() deserialize_i8() deserialize_i16() deserialize_i32()
        deserialize_i64() deserialize_i128() deserialize_u8() deserialize_u16() deserialize_u32()
        deserialize_u64() deserialize_u128() deserialize_f32() deserialize_f64() deserialize_char()
        deserialize_str() deserialize_string() deserialize_bytes() deserialize_byte_buf()
        deserialize_identifier() deserialize_unit() deserialize_map() deserialize_ignored_any()
        deserialize_unit_struct(name: &'static str)
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
        deserialize_enum(name: &'static str, variants: &'static [&'static str])
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(List { values: self.values.iter() })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }
}

struct List<'a> {
    values: std::slice::Iter<'a, Option<String>>,
}

impl<'de> de::SeqAccess<'de> for List<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        match self.values.next() {
            None => Ok(None),
            Some(value) => seed.deserialize(Value { text: value.as_deref() }).map(Some),
        }
    }
}

/// One value; `None` where only the key is there.
#[derive(Clone, Copy)]
struct Value<'a> {
    text: Option<&'a str>,
}

impl<'a> Value<'a> {
    fn text(&self) -> Result<&'a str, Error> {
        self.text.ok_or_else(|| Error("a value is missing: add '=' and the value".into()))
    }

    /// The text as an integer of 128 bits, which every smaller one fits in.
    fn integer(&self) -> Result<i128, Error> {
        let text = self.text()?;
        let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
        let number = match hex {
            Some(digits) if !digits.starts_with(['+', '-']) => i128::from_str_radix(digits, 16),
            _ => text.parse(),
        };
        number.map_err(|_| Error(format!("'{text}' is not a whole number")))
    }
}

macro_rules! integers {
    ($($method:ident $visit:ident $type:ty;)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            let number = self.integer()?;
            let number = <$type>::try_from(number).map_err(|_| {
                Error(format!("{number} is out of range: use {} to {}", <$type>::MIN, <$type>::MAX))
            })?;
            visitor.$visit(number)
        })*
    };
}

impl<'de> de::Deserializer<'de> for Value<'_> {
    type Error = Error;

    integers! {
        deserialize_i8 visit_i8 i8;
        deserialize_i16 visit_i16 i16;
        deserialize_i32 visit_i32 i32;
        deserialize_i64 visit_i64 i64;
        deserialize_i128 visit_i128 i128;
        deserialize_u8 visit_u8 u8;
        deserialize_u16 visit_u16 u16;
        deserialize_u32 visit_u32 u32;
        deserialize_u64 visit_u64 u64;
        deserialize_u128 visit_u128 u128;
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.text {
            None | Some("true" | "on" | "yes") => visitor.visit_bool(true),
            Some("false" | "off" | "no") => visitor.visit_bool(false),
            Some(text) => Err(Error(format!("'{text}' is neither true nor false"))),
        }
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let text = self.text()?;
        let number = text.parse().map_err(|_| Error(format!("'{text}' is not a number")))?;
        visitor.visit_f64(number)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.text {
            None => visitor.visit_unit(),
            Some(text) => Err(Error(format!("takes no value, but '{text}' is given"))),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(Variant { name: self.text()?, content: Vec::new() })
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(List { values: [self.text.map(str::to_owned)].iter() })
    }

    serde::forward_to_deserialize_any! {
        char str string bytes byte_buf unit_struct tuple tuple_struct map struct identifier
        ignored_any
    }
}

/// A variant's name and the items of its content.
struct Variant<'a> {
    name: &'a str,
    content: Vec<Item>,
}

impl<'de, 'a> de::EnumAccess<'de> for Variant<'a> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let name: StrDeserializer<'_, Error> = self.name.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> de::VariantAccess<'de> for Variant<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.content.first() {
            None => Ok(()),
            Some(item) => {
                Err(Error(format!("'{}' takes nothing more, not '{}'", self.name, item.whole())))
            }
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(Text { items: &self.content })
            .map_err(|Error(message)| Error(format!("{}: {message}", self.name)))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        de::Deserializer::deserialize_seq(Text { items: &self.content }, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Fields::new(&self.content, fields)?)
    }
}
