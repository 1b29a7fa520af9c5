//! The bytes of everything in this crate that travels: one rule for each kind of value, and the macro that applies them.
//!
//! | value | bytes |
//! |---|---|
//! | integer | its width, little endian; signed ones in two's complement |
//! | bool | one, 0 or 1 |
//! | structure | its fields in the order of their declaration, nothing between them |
//! | flags | one byte, each flag a bit; other bits are zero |
//! | enumeration | one byte, the number that stands with the variant, then the variant's fields |
//! | optional value | one byte, 0 or 1, then the value; an absent value of fixed size leaves its place, all zero |
//! | list, bytes, text | a count of 32 bits, at most the named limit, then the elements |
//!
//! So a message without lists has every field at a fixed offset, present or not. There is exactly one encoding of a value:
//! whatever decodes encodes to the same bytes again. Everything else is refused, and the error names the field.
//!
//! Numbers of variants and orders of fields never change within a [`crate::PROTOCOL_VERSION`]; a test pins the bytes of each.

use std::fmt;

/// Why bytes are no encoding of the value that was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// So many bytes are needed and so many are left.
    Short {
        needed: usize,
        left: usize,
    },
    /// Bytes that follow the value.
    Trailing(usize),
    /// A number that stands for no variant of this enumeration, or sets a bit that is no flag of it.
    Unknown {
        what: &'static str,
        value: u8,
    },
    /// Neither 0 nor 1.
    Boolean(u8),
    /// An absent value whose place is not all zero.
    AbsentNotZero,
    /// A list, byte string or text longer than it may be.
    OverLimit {
        length: usize,
        limit: usize,
    },
    NotUtf8,
    /// A range whose end lies before its start.
    Inverted {
        lo: u64,
        hi: u64,
    },
    /// A number above what the field may hold.
    TooLarge {
        value: u64,
        maximum: u64,
    },
    /// A number outside of what errno values are.
    NoErrno(i32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Short { needed, left } => write!(f, "needs {needed} bytes, {left} are left"),
            Fault::Trailing(bytes) => write!(f, "{bytes} bytes follow the end"),
            Fault::Unknown { what, value } => write!(f, "{value} is no {what}"),
            Fault::Boolean(value) => write!(f, "{value} is neither 0 nor 1"),
            Fault::AbsentNotZero => write!(f, "absent, but its bytes are not zero"),
            Fault::OverLimit { length, limit } => write!(f, "length {length}, at most {limit} is allowed"),
            Fault::NotUtf8 => write!(f, "not UTF-8"),
            Fault::Inverted { lo, hi } => write!(f, "the range ends at {hi}, before its start at {lo}"),
            Fault::TooLarge { value, maximum } => write!(f, "{value}, at most {maximum} is allowed"),
            Fault::NoErrno(value) => write!(f, "{value} is no errno"),
        }
    }
}

/// A fault and the field it is in. Boxed: errors are rare, and results stay small.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(Box<(Vec<&'static str>, Fault)>);

impl Malformed {
    #[cold]
    pub(crate) fn new(fault: Fault) -> Malformed {
        Malformed(Box::new((Vec::new(), fault)))
    }

    /// Says which field of the enclosing value this was.
    #[cold]
    pub(crate) fn within(mut self, name: &'static str) -> Malformed {
        self.0.0.push(name);
        self
    }

    /// Names from the outermost value to the field at fault, joined by dots.
    pub fn field(&self) -> String {
        self.0.0.iter().rev().copied().collect::<Vec<_>>().join(".")
    }

    pub fn fault(&self) -> &Fault {
        &self.0.1
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field(), self.fault())
    }
}

impl std::error::Error for Malformed {}

pub(crate) type Result<T> = std::result::Result<T, Malformed>;

/// Bytes not yet decoded.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// # Errors
    /// [`Fault::Short`].
    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        match self.0.split_at_checked(length) {
            Some((bytes, rest)) => {
                self.0 = rest;
                Ok(bytes)
            }
            None => Err(self.short(length)),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.0.split_first_chunk() {
            Some((bytes, rest)) => {
                self.0 = rest;
                Ok(*bytes)
            }
            None => Err(self.short(N)),
        }
    }

    #[cold]
    fn short(&self, needed: usize) -> Malformed {
        Malformed::new(Fault::Short { needed, left: self.left() })
    }

    /// A count of elements of at least `size` bytes each, checked against its limit and against what is there before
    /// anybody allocates for it.
    fn count(&mut self, limit: usize, size: usize) -> Result<usize> {
        let length = u32::decode(self)? as usize;
        if length > limit {
            return Err(Malformed::new(Fault::OverLimit { length, limit }));
        }
        if length.saturating_mul(size) > self.left() {
            return Err(self.short(length.saturating_mul(size)));
        }
        Ok(length)
    }

    /// # Errors
    /// [`Fault::Trailing`] unless everything has been decoded.
    pub fn end(&self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::new(Fault::Trailing(self.0.len()))) }
    }
}

/// A type with one fixed layout.
pub trait Wire: Sized {
    /// Bytes of every value, for types all of whose values have the same length.
    const SIZE: Option<usize>;
    /// No value is shorter, bytes.
    const MINIMUM: usize;

    fn encode(&self, out: &mut Vec<u8>);

    /// # Errors
    /// [`Malformed`] for bytes that no value encodes to.
    fn decode(reader: &mut Reader<'_>) -> Result<Self>;

    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> Self;
}

/// A layout for a type that has not one for all uses: lists of different limits, bounded numbers.
pub trait Codec<T> {
    const SIZE: Option<usize>;
    const MINIMUM: usize;
    fn encode(value: &T, out: &mut Vec<u8>);
    fn decode(reader: &mut Reader<'_>) -> Result<T>;
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> T;
}

/// Where samples of the protocol's types take their choices from, for tests that need values of every kind.
#[cfg(feature = "sample")]
pub trait Source {
    /// A number of at most so many bits.
    fn number(&mut self, bits: u32) -> u64;
    /// A number below `bound`, which is not zero.
    fn below(&mut self, bound: u64) -> u64;
    /// Elements of a list that may have so many.
    fn length(&mut self, maximum: usize) -> usize;
    /// Whether values must be ones that decode. Otherwise ranges may be inverted, bounded numbers too large, texts not UTF-8.
    fn is_lawful(&self) -> bool;
}

/// The type's own layout.
pub struct Plain;

impl<T: Wire> Codec<T> for Plain {
    const SIZE: Option<usize> = T::SIZE;
    const MINIMUM: usize = T::MINIMUM;
    #[inline]
    fn encode(value: &T, out: &mut Vec<u8>) {
        value.encode(out)
    }
    #[inline]
    fn decode(reader: &mut Reader<'_>) -> Result<T> {
        T::decode(reader)
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> T {
        T::sample(source)
    }
}

/// At most `MAX` elements.
pub struct List<const MAX: usize, E = Plain>(std::marker::PhantomData<E>);

impl<T, E: Codec<T>, const MAX: usize> Codec<Vec<T>> for List<MAX, E> {
    const SIZE: Option<usize> = None;
    const MINIMUM: usize = 4;
    fn encode(value: &Vec<T>, out: &mut Vec<u8>) {
        (value.len() as u32).encode(out);
        for element in value {
            E::encode(element, out);
        }
    }
    fn decode(reader: &mut Reader<'_>) -> Result<Vec<T>> {
        let count = reader.count(MAX, E::MINIMUM)?;
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            list.push(E::decode(reader)?);
        }
        Ok(list)
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> Vec<T> {
        (0..source.length(MAX)).map(|_| E::sample(source)).collect()
    }
}

/// At most `MAX` bytes.
pub struct Bytes<const MAX: usize>;

impl<const MAX: usize> Codec<Vec<u8>> for Bytes<MAX> {
    const SIZE: Option<usize> = None;
    const MINIMUM: usize = 4;
    fn encode(value: &Vec<u8>, out: &mut Vec<u8>) {
        (value.len() as u32).encode(out);
        out.extend_from_slice(value);
    }
    fn decode(reader: &mut Reader<'_>) -> Result<Vec<u8>> {
        let count = reader.count(MAX, 1)?;
        Ok(reader.bytes(count)?.to_vec())
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> Vec<u8> {
        (0..source.length(MAX)).map(|_| source.number(8) as u8).collect()
    }
}

/// At most `MAX` bytes of UTF-8.
pub struct Text<const MAX: usize>;

impl<const MAX: usize> Codec<String> for Text<MAX> {
    const SIZE: Option<usize> = None;
    const MINIMUM: usize = 4;
    fn encode(value: &String, out: &mut Vec<u8>) {
        (value.len() as u32).encode(out);
        out.extend_from_slice(value.as_bytes());
    }
    fn decode(reader: &mut Reader<'_>) -> Result<String> {
        let count = reader.count(MAX, 1)?;
        match str::from_utf8(reader.bytes(count)?) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(Malformed::new(Fault::NotUtf8)),
        }
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> String {
        // Two characters of more than one byte among them; the length in bytes stays within the limit.
        (0..source.length(MAX / 4))
            .map(|_| *[' ', 'a', 'z', 'é', '🔒'].get(source.below(5) as usize).unwrap())
            .collect()
    }
}

/// A number of at most `MAX`.
pub struct UpTo<const MAX: u32>;

impl<const MAX: u32> Codec<u32> for UpTo<MAX> {
    const SIZE: Option<usize> = Some(4);
    const MINIMUM: usize = 4;
    #[inline]
    fn encode(value: &u32, out: &mut Vec<u8>) {
        value.encode(out)
    }
    #[inline]
    fn decode(reader: &mut Reader<'_>) -> Result<u32> {
        let value = u32::decode(reader)?;
        if value > MAX {
            return Err(Malformed::new(Fault::TooLarge { value: value.into(), maximum: MAX.into() }));
        }
        Ok(value)
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> u32 {
        let value = source.number(32) as u32;
        if source.is_lawful() { value.min(MAX) } else { value }
    }
}

/// An error number as errno.h has them: 1 to 4095.
pub struct ErrorNumber;

impl Codec<i32> for ErrorNumber {
    const SIZE: Option<usize> = Some(4);
    const MINIMUM: usize = 4;
    fn encode(value: &i32, out: &mut Vec<u8>) {
        value.encode(out)
    }
    fn decode(reader: &mut Reader<'_>) -> Result<i32> {
        let value = i32::decode(reader)?;
        if (1..=4095).contains(&value) { Ok(value) } else { Err(Malformed::new(Fault::NoErrno(value))) }
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> i32 {
        let value = source.number(32) as i32;
        if source.is_lawful() { value.clamp(1, 4095) } else { value }
    }
}

impl<S, T, A: Codec<S>, B: Codec<T>> Codec<(S, T)> for (A, B) {
    const SIZE: Option<usize> = plus(A::SIZE, B::SIZE);
    const MINIMUM: usize = A::MINIMUM + B::MINIMUM;
    fn encode(value: &(S, T), out: &mut Vec<u8>) {
        A::encode(&value.0, out);
        B::encode(&value.1, out);
    }
    fn decode(reader: &mut Reader<'_>) -> Result<(S, T)> {
        Ok((A::decode(reader)?, B::decode(reader)?))
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> (S, T) {
        (A::sample(source), B::sample(source))
    }
}

macro_rules! integers {
    ($($integer:ident)*) => {$(
        impl Wire for $integer {
            const SIZE: Option<usize> = Some(size_of::<$integer>());
            const MINIMUM: usize = size_of::<$integer>();
            #[inline]
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            #[inline]
            fn decode(reader: &mut Reader<'_>) -> Result<Self> {
                Ok($integer::from_le_bytes(reader.array()?))
            }
            #[cfg(feature = "sample")]
            fn sample(source: &mut dyn Source) -> Self {
                source.number($integer::BITS) as $integer
            }
        }
    )*};
}
integers! { u8 u16 u32 u64 i32 i64 }

impl Wire for bool {
    const SIZE: Option<usize> = Some(1);
    const MINIMUM: usize = 1;
    #[inline]
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(*self as u8);
    }
    #[inline]
    fn decode(reader: &mut Reader<'_>) -> Result<Self> {
        match u8::decode(reader)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Malformed::new(Fault::Boolean(other))),
        }
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> Self {
        source.below(2) == 1
    }
}

impl<T: Wire> Wire for Option<T> {
    const SIZE: Option<usize> = plus(Some(1), T::SIZE);
    const MINIMUM: usize = match T::SIZE {
        Some(size) => 1 + size,
        None => 1,
    };
    #[inline]
    fn encode(&self, out: &mut Vec<u8>) {
        self.is_some().encode(out);
        match self {
            Some(value) => value.encode(out),
            None => out.resize(out.len() + T::SIZE.unwrap_or(0), 0),
        }
    }
    #[inline]
    fn decode(reader: &mut Reader<'_>) -> Result<Self> {
        if bool::decode(reader)? {
            return T::decode(reader).map(Some);
        }
        if reader.bytes(T::SIZE.unwrap_or(0))?.iter().any(|byte| *byte != 0) {
            return Err(Malformed::new(Fault::AbsentNotZero));
        }
        Ok(None)
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> Self {
        bool::sample(source).then(|| T::sample(source))
    }
}

impl<T: Wire> Wire for Box<T> {
    const SIZE: Option<usize> = T::SIZE;
    const MINIMUM: usize = T::MINIMUM;
    fn encode(&self, out: &mut Vec<u8>) {
        (**self).encode(out);
    }
    fn decode(reader: &mut Reader<'_>) -> Result<Self> {
        T::decode(reader).map(Box::new)
    }
    #[cfg(feature = "sample")]
    fn sample(source: &mut dyn Source) -> Self {
        Box::new(T::sample(source))
    }
}

macro_rules! tuples {
    ($(($($member:ident $index:tt),*))*) => {$(
        impl<$($member: Wire),*> Wire for ($($member),*) {
            const SIZE: Option<usize> = sum(&[$($member::SIZE),*]);
            const MINIMUM: usize = 0 $(+ $member::MINIMUM)*;
            fn encode(&self, out: &mut Vec<u8>) {
                $( self.$index.encode(out); )*
            }
            fn decode(reader: &mut Reader<'_>) -> Result<Self> {
                Ok(($($member::decode(reader)?),*))
            }
            #[cfg(feature = "sample")]
            fn sample(source: &mut dyn Source) -> Self {
                ($($member::sample(source)),*)
            }
        }
    )*};
}
tuples! { (A 0, B 1) (A 0, B 1, C 2) }

pub(crate) const fn plus(one: Option<usize>, other: Option<usize>) -> Option<usize> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one + other),
        _ => None,
    }
}

pub(crate) const fn sum(sizes: &[Option<usize>]) -> Option<usize> {
    let mut total = Some(0);
    let mut at = 0;
    while at < sizes.len() {
        total = plus(total, sizes[at]);
        at += 1;
    }
    total
}

/// The size of variants if it is the same for all.
pub(crate) const fn common(variants: &[Variant]) -> Option<usize> {
    let Some(first) = variants[0].size else { return None };
    let mut at = 1;
    while at < variants.len() {
        match variants[at].size {
            Some(size) if size == first => at += 1,
            _ => return None,
        }
    }
    Some(first)
}

pub(crate) const fn smallest(minimums: &[usize]) -> usize {
    let mut smallest = minimums[0];
    let mut at = 1;
    while at < minimums.len() {
        if minimums[at] < smallest {
            smallest = minimums[at];
        }
        at += 1;
    }
    smallest
}

/// A variant of an enumeration that travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    pub name: &'static str,
    /// What stands for it.
    pub number: u8,
    /// Bytes of its fields, where all values have the same length.
    pub size: Option<usize>,
}

/// An enumeration with fields, taken apart: messages carry the number of their variant in the header.
pub trait Variants: Sized {
    /// In the order of declaration.
    const VARIANTS: &'static [Variant];

    /// Index of this value's variant in [`Self::VARIANTS`].
    fn index(&self) -> usize;

    fn variant(&self) -> Variant {
        Self::VARIANTS[self.index()]
    }

    fn encode_fields(&self, out: &mut Vec<u8>);

    /// # Errors
    /// [`Malformed`] for a number that stands for no variant, and for bytes that are not its fields.
    fn decode_fields(number: u8, reader: &mut Reader<'_>) -> Result<Self>;

    /// A value of the variant at `index`.
    #[cfg(feature = "sample")]
    fn sample_variant(index: usize, source: &mut dyn Source) -> Self;
}

/// The codec of a field: what stands behind `as`, or the type's own.
macro_rules! codec {
    () => {
        $crate::wire::Plain
    };
    ($codec:ty) => {
        $codec
    };
}

/// Declares types and, in the same lines, their layouts: see the table in this module. Behind a field's type may stand
/// `as CODEC`; before a variant's fields stands the number it travels as.
macro_rules! wire {
    () => {};
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$field_meta:meta])* pub $field:ident : $type:ty $(as $codec:ty)?),* $(,)?
        }
        $($rest:tt)*
    ) => {
        $(#[$meta])*
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }
        impl $crate::wire::Wire for $name {
            const SIZE: Option<usize> =
                $crate::wire::sum(&[$(<$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::SIZE),*]);
            const MINIMUM: usize =
                0 $(+ <$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::MINIMUM)*;
            #[inline]
            fn encode(&self, out: &mut Vec<u8>) {
                $( <$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::encode(&self.$field, out); )*
            }
            #[inline]
            fn decode(reader: &mut $crate::wire::Reader<'_>) -> $crate::wire::Result<Self> {
                Ok($name {$(
                    $field: <$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::decode(reader)
                        .map_err(|malformed| malformed.within(stringify!($field)))?,
                )*})
            }
            #[cfg(feature = "sample")]
            fn sample(source: &mut dyn $crate::wire::Source) -> Self {
                $name {$(
                    $field: <$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::sample(source),
                )*}
            }
        }
        $crate::wire::wire! { $($rest)* }
    };
    (
        $(#[$meta:meta])*
        pub flags $name:ident {
            $($(#[$field_meta:meta])* pub $field:ident = $bit:literal),* $(,)?
        }
        $($rest:tt)*
    ) => {
        $(#[$meta])*
        pub struct $name {
            $($(#[$field_meta])* pub $field: bool,)*
        }
        impl $crate::wire::Wire for $name {
            const SIZE: Option<usize> = Some(1);
            const MINIMUM: usize = 1;
            #[inline]
            fn encode(&self, out: &mut Vec<u8>) {
                out.push(0 $(| if self.$field { $bit } else { 0 })*);
            }
            #[inline]
            fn decode(reader: &mut $crate::wire::Reader<'_>) -> $crate::wire::Result<Self> {
                let value = u8::decode(reader)?;
                if value & !(0 $(| $bit)*) != 0 {
                    let fault = $crate::wire::Fault::Unknown { what: stringify!($name), value };
                    return Err($crate::wire::Malformed::new(fault));
                }
                Ok($name { $($field: value & $bit != 0),* })
            }
            #[cfg(feature = "sample")]
            fn sample(source: &mut dyn $crate::wire::Source) -> Self {
                $name { $($field: bool::sample(source)),* }
            }
        }
        $crate::wire::wire! { $($rest)* }
    };
    (
        $(#[$meta:meta])*
        pub enum $name:ident {
            $(
                $(#[$variant_meta:meta])*
                $variant:ident = $number:literal
                $({ $($(#[$field_meta:meta])* $field:ident : $type:ty $(as $codec:ty)?),* $(,)? })?
                $(( $inner:ident : $inner_type:ty $(as $inner_codec:ty)? ))?
            ),* $(,)?
        }
        $($rest:tt)*
    ) => {
        $(#[$meta])*
        pub enum $name {
            $(
                $(#[$variant_meta])*
                $variant
                $({ $($(#[$field_meta])* $field: $type),* })?
                $(($inner_type))?
            ),*
        }
        impl $crate::wire::Variants for $name {
            const VARIANTS: &'static [$crate::wire::Variant] = &[$(
                $crate::wire::Variant {
                    name: stringify!($variant),
                    number: $number,
                    size: $crate::wire::sum(&[
                        $($(<$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::SIZE,)*)?
                        $(<$crate::wire::codec!($($inner_codec)?) as $crate::wire::Codec<$inner_type>>::SIZE,)?
                    ]),
                }
            ),*];
            #[inline]
            fn index(&self) -> usize {
                // A plain enumeration of the variants numbers them in order.
                enum Index { $($variant),* }
                match self {
                    $( $name::$variant { .. } => Index::$variant as usize, )*
                }
            }
            #[inline]
            #[allow(unused_variables)]
            fn encode_fields(&self, out: &mut Vec<u8>) {
                match self {$(
                    $name::$variant $({ $($field),* })? $(($inner))? => {
                        $($(<$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::encode($field, out);)*)?
                        $(<$crate::wire::codec!($($inner_codec)?) as $crate::wire::Codec<$inner_type>>::encode($inner, out);)?
                    }
                )*}
            }
            #[inline]
            #[allow(unused_variables)]
            fn decode_fields(number: u8, reader: &mut $crate::wire::Reader<'_>) -> $crate::wire::Result<Self> {
                match number {
                    $(
                        $number => Ok($name::$variant
                            $({$(
                                $field: <$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::decode(reader)
                                    .map_err(|malformed| {
                                        malformed.within(stringify!($field)).within(stringify!($variant))
                                    })?
                            ),*})?
                            $((
                                <$crate::wire::codec!($($inner_codec)?) as $crate::wire::Codec<$inner_type>>::decode(reader)
                                    .map_err(|malformed| {
                                        malformed.within(stringify!($inner)).within(stringify!($variant))
                                    })?
                            ))?
                        ),
                    )*
                    value => {
                        let fault = $crate::wire::Fault::Unknown { what: stringify!($name), value };
                        Err($crate::wire::Malformed::new(fault))
                    }
                }
            }
            #[cfg(feature = "sample")]
            #[allow(unused_variables)]
            fn sample_variant(index: usize, source: &mut dyn $crate::wire::Source) -> Self {
                match Self::VARIANTS[index].number {
                    $(
                        $number => $name::$variant
                            $({$(
                                $field: <$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::sample(source)
                            ),*})?
                            $((
                                <$crate::wire::codec!($($inner_codec)?) as $crate::wire::Codec<$inner_type>>::sample(source)
                            ))?,
                    )*
                    _ => unreachable!("the list of variants is complete"),
                }
            }
        }
        impl $crate::wire::Wire for $name {
            const SIZE: Option<usize> = $crate::wire::plus(
                Some(1),
                $crate::wire::common(<$name as $crate::wire::Variants>::VARIANTS),
            );
            const MINIMUM: usize = 1 + $crate::wire::smallest(&[$(
                0
                $($(+ <$crate::wire::codec!($($codec)?) as $crate::wire::Codec<$type>>::MINIMUM)*)?
                $(+ <$crate::wire::codec!($($inner_codec)?) as $crate::wire::Codec<$inner_type>>::MINIMUM)?
            ),*]);
            #[inline]
            fn encode(&self, out: &mut Vec<u8>) {
                use $crate::wire::Variants;
                out.push(self.variant().number);
                self.encode_fields(out);
            }
            #[inline]
            fn decode(reader: &mut $crate::wire::Reader<'_>) -> $crate::wire::Result<Self> {
                let number = u8::decode(reader)?;
                <Self as $crate::wire::Variants>::decode_fields(number, reader)
            }
            #[cfg(feature = "sample")]
            fn sample(source: &mut dyn $crate::wire::Source) -> Self {
                use $crate::wire::Variants;
                let index = source.below(Self::VARIANTS.len() as u64) as usize;
                Self::sample_variant(index, source)
            }
        }
        $crate::wire::wire! { $($rest)* }
    };
}
pub(crate) use {codec, wire};
