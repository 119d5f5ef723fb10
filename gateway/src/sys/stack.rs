//! Stacks of threads that live as long as the process: what a deep call has touched stays resident, on fifty threads for good.
//!
//! Trap: a stack is known by where it began and by how large it was made, so only [`spawn`] hands one out.

use std::io;
use std::marker::PhantomData;
use std::thread::{Builder, JoinHandle};

/// What a thread of [`spawn`] has, bytes.
const STACK_BYTES: usize = 256 * 1024;

/// Starts a thread that can give back what its stack does not need.
pub fn spawn<T: Send + 'static>(
    name: String,
    body: impl FnOnce(Stack) -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name).stack_size(STACK_BYTES).spawn(|| body(Stack::here()))
}

/// The stack of the thread that was given it. Not `Send`.
pub struct Stack {
    /// An address near its beginning; it grows downwards from there.
    top: usize,
    page_bytes: usize,
    _this_thread: PhantomData<*const ()>,
}

impl Stack {
    /// Of the calling thread, which has [`STACK_BYTES`] and has used less than half of them so far.
    #[inline(never)]
    fn here() -> Stack {
        let local = 0u8;
        // SAFETY: asks for a number.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page_bytes = usize::try_from(page_bytes).unwrap_or(STACK_BYTES);
        Stack { top: &raw const local as usize, page_bytes, _this_thread: PhantomData }
    }

    /// Gives back to the kernel whatever deeper calls have touched.
    #[inline(never)]
    pub fn give_back(&self) {
        let local = 0u8;
        let high = (&raw const local as usize - KEPT_BYTES) & !(self.page_bytes - 1);
        let low = (self.top - STACK_BYTES / 2) & !(self.page_bytes - 1);
        if low < high {
            // SAFETY: all of it is in this thread's stack, since half of that is below `top`; and everything that this
            // call, the call into the kernel and their callers have there lies above `high`.
            unsafe { libc::madvise(low as *mut libc::c_void, high - low, libc::MADV_DONTNEED) };
        }
    }
}

/// For what [`Stack::give_back`] itself and the call into the kernel have there: nothing but a return address and registers.
const KEPT_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn touch(bytes: usize) -> u64 {
        let page = std::hint::black_box([1u8; 4096]);
        if bytes < page.len() {
            u64::from(page[bytes])
        } else {
            touch(bytes - page.len()) + u64::from(page[0])
        }
    }

    /// Pages of the stack that are resident, below this call.
    fn resident(stack: &Stack) -> usize {
        let low = (stack.top - STACK_BYTES / 2) & !(stack.page_bytes - 1);
        let mut pages = vec![0u8; (stack.top - low) / stack.page_bytes];
        // SAFETY: as above, and one byte a page is there to be written.
        let told = unsafe {
            libc::mincore(low as *mut libc::c_void, pages.len() * stack.page_bytes, pages.as_mut_ptr())
        };
        assert_eq!(told, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    fn what_deep_calls_touched_is_given_back_and_can_be_used_again() {
        let thread = spawn("deep".into(), |stack| {
            for _ in 0..3 {
                assert!(touch(80 * 1024) >= 20);
                let before = resident(&stack);
                stack.give_back();
                let after = resident(&stack);
                assert!(before >= 80 * 1024 / stack.page_bytes && after <= 4, "{before} {after}");
            }
        });
        thread.unwrap().join().unwrap();
    }
}
