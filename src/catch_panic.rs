//! Calls into libraries that panic on damaged files, such as the Parquet and tokenizer readers:
//! turns a panic into an error message.

use std::{
    any::Any,
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `call` and returns its panic message if it panics. `call` must not leave anything half
/// changed.
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    static QUIET: Once = Once::new();
    // Do not print a panic that becomes an error.
    QUIET.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CATCHING.get() {
                hook(info);
            }
        }));
    });
    let before = CATCHING.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(call));
    CATCHING.set(before);
    result.map_err(|panic| message(&*panic))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("damaged: {}", text.unwrap_or("its reader panics"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_errors() {
        assert_eq!(catch_panic(|| 3), Ok(3));
        assert_eq!(
            catch_panic(|| panic!("no {}", "page")),
            Err::<(), _>("damaged: no page".into())
        );
        assert_eq!(catch_panic(|| panic!("none")), Err::<(), _>("damaged: none".into()));
        assert!(!CATCHING.get());
    }
}
