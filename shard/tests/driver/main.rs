//! The stand-ins for CUDA's libraries, through the crate that drives the real ones: that they do what CUDA does where the CUDA
//! device relies on it, and that a host's mistakes show.
//!
//! A context that failed stays failed, so tests that make one fail have a GPU of their own.
#![allow(unsafe_code)]

/// Calls a function of CUDA and gives what it answers.
macro_rules! cuda {
    ($function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the stand-ins look up handles and device addresses before they use them, and the rest are references to what
        // outlives the call.
        unsafe { cudarc::driver::sys::$function($($argument),*) }
    }};
}

/// Calls a function of CUDA that must succeed.
macro_rules! ok {
    ($function:ident($($argument:expr),* $(,)?)) => {
        assert_eq!(cuda!($function($($argument),*)), cudarc::driver::sys::CUresult::CUDA_SUCCESS)
    };
}

mod collectives;
mod early;
mod errors;
mod gpu;
mod graphs;
mod launches;
#[path = "../emulation/libraries.rs"]
mod libraries;
mod processes;
mod products;
mod streams;
