//! Macros that choose the instance of a generic handler.

/// The handler of a size, after constant parameters.
macro_rules! sized {
    ($z:expr, $f:path $(, $k:expr)*) => {
        match $z {
            1 => { use $f as f; f::<$({$k},)* 1> as Handler }
            2 => { use $f as f; f::<$({$k},)* 2> as Handler }
            4 => { use $f as f; f::<$({$k},)* 4> as Handler }
            _ => { use $f as f; f::<$({$k},)* 8> as Handler }
        }
    };
}

/// The handler of one of `$k`.
macro_rules! kinds {
    ($value:expr, $z:expr, $f:path, [$($k:literal)*]) => {
        match $value {
            $($k => sized!($z, $f, $k),)*
            _ => return None,
        }
    };
}

/// The handler of a condition.
macro_rules! conditions {
    ($cc:expr, |$c:ident| $make:expr) => {
        conditions!(@ $cc, |$c| $make, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15])
    };
    (@ $cc:expr, |$c:ident| $make:expr, [$($k:literal)*]) => {
        match $cc {
            $($k => { const $c: u8 = $k; $make })*
            _ => return None,
        }
    };
}

pub(super) use {conditions, kinds, sized};
