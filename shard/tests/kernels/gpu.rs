//! Kernels on a GPU, where `LOCKSTEP_TEST_GPU` has its number: compiled and loaded as in production, launched through the driver.
//!
//! Every buffer is an allocation of its own, of exactly its bytes, so that `compute-sanitizer` sees what is read beside one.
#![allow(unsafe_code)]

use std::{
    env,
    ffi::{CString, c_void},
    process::Command,
    ptr,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::{result, sys};
use lockstep_shard::device::cuda::{
    Gpu,
    compile::{self, Arch, Compiler},
    libraries,
    modules::{HEADERS, sources},
};

use super::emulator::{Argument, Launch, Source};

/// How long a kernel may take. One that takes longer waits for what does not come.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Dynamic shared memory that a launch may ask for without having said so before.
const DEFAULT_SHARED_BYTES: usize = 48 << 10;

/// Pointers of a structure of one for each rank, whatever the world size.
const RANKS: usize = 8;

/// The GPU that tests run on; `None`: the emulation.
pub fn ordinal() -> Option<usize> {
    let value = env::var("LOCKSTEP_TEST_GPU").ok()?;
    Some(value.parse().unwrap_or_else(|error| panic!("LOCKSTEP_TEST_GPU={value}: {error}")))
}

/// Whether a test is left out because it is of the emulation; it then says so.
pub fn is_left_out(what: &str) -> bool {
    let left_out = ordinal().is_some();
    if left_out {
        println!("left out on a GPU: {what}");
    }
    left_out
}

/// Whether a test is left out because its kernels are a Hopper's, and the GPU is another; it then says so.
pub fn is_beside_hopper() -> bool {
    let Some(ordinal) = ordinal() else { return false };
    let arch = libraries::driver().and_then(|_| libraries::gpu(ordinal)).expect("there is the GPU").0.arch;
    let left_out = arch != Arch::HOPPER;
    if left_out {
        println!("left out on {arch}: kernels of {}", Arch::HOPPER);
    }
    left_out
}

/// A loaded module. Whichever thread launches, its kernels are those of the GPU's one context.
pub struct Kernels {
    ordinal: usize,
    module: sys::CUmodule,
}

// SAFETY: the driver's calls on a module may come from any thread, and the module is never unloaded.
unsafe impl Send for Kernels {}
// SAFETY: the same.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// A source as it is.
    pub fn of(ordinal: usize, source: Source) -> Result<Self> {
        Self::compile(ordinal, production(ordinal, source)?, HEADERS)
    }

    /// A copy of the source in which `from`, which is in `file` once, is replaced.
    pub fn changed(ordinal: usize, source: Source, file: &str, from: &str, to: &str) -> Result<Self> {
        let mut headers = HEADERS.to_vec();
        let mut source = production(ordinal, source)?;
        let one = headers.iter_mut().find(|header| header.file == file).unwrap_or(&mut source);
        ensure!(one.file == file, "there is no {file}");
        let count = one.text.matches(from).count();
        ensure!(count == 1, "{file} has {count} places that read {from:?}");
        // Sources live as long as the process; there are few changed ones.
        one.text = one.text.replace(from, to).leak();
        Self::compile(ordinal, source, &headers)
    }

    fn compile(ordinal: usize, source: compile::Source, headers: &[compile::Source]) -> Result<Self> {
        libraries::driver()?;
        let (found, _) = libraries::gpu(ordinal)?;
        // Kept open for good: the module must outlive the thread that came first.
        std::mem::forget(Gpu::open(ordinal as i32)?);
        let start = Instant::now();
        let cubin = Compiler::new(found.arch)?.compile(source, headers)?.cubin;
        println!("{} for {} ({}): {:?}", source.file, found.name, found.arch, start.elapsed());
        // SAFETY: NVRTC made the image, and the context is current.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }?;
        Ok(Self { ordinal, module })
    }

    /// Runs a kernel; the bytes of the buffers that it changes, in their order.
    pub fn run(&self, launch: &Launch) -> Result<Vec<u8>> {
        // One launch at a time: where a kernel waits for a copy, a call that reserves memory may wait for that kernel, and hold up
        // the copy.
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let gpu = Gpu::open(self.ordinal as i32)?;
        let buffers = Buffers::new(&launch.arguments)?;
        let later = Later::new(&buffers, &launch.arguments)?;
        let mut parameters = buffers.parameters(&launch.arguments)?;
        let mut places: Vec<*mut c_void> = parameters.iter_mut().map(|p| p.as_mut_ptr().cast()).collect();
        let function = self.function(launch)?;
        let [x, y, z] = launch.grid.map(|blocks| blocks as u32);
        let (block, shared) = (launch.block as u32, launch.dynamic_shared_bytes as u32);
        // SAFETY: the parameters are those that the test lists, as large as the kernel declares; the buffers live until the
        // stream is done, or for good.
        unsafe {
            result::launch_kernel(function, (x, y, z), (block, 1, 1), shared, gpu.stream(), &mut places)
        }?;
        let wait = || {
            let start = Instant::now();
            while !gpu.is_idle()? {
                ensure!(start.elapsed() < TIMEOUT, "the kernel does not end: a wait for what nobody writes");
                thread::yield_now();
            }
            anyhow::Ok(())
        };
        if let Err(error) = later.write().and_then(|()| wait()) {
            // What may still run, runs on in memory that stays.
            std::mem::forget((gpu, buffers, later));
            return Err(error);
        }
        buffers.outputs(&launch.arguments)
    }

    fn function(&self, launch: &Launch) -> Result<sys::CUfunction> {
        let name = CString::new(launch.kernel.as_str())?;
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.module, name) }?;
        if launch.dynamic_shared_bytes > DEFAULT_SHARED_BYTES {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = launch.dynamic_shared_bytes as i32;
            // SAFETY: the function is of a loaded module.
            unsafe { result::function::set_function_attribute(function, attribute, bytes) }?;
        }
        Ok(function)
    }
}

fn production(ordinal: usize, source: Source) -> Result<compile::Source> {
    let file = format!("{}.cu", source.name());
    libraries::driver()?;
    let arch = libraries::gpu(ordinal)?.0.arch;
    let found = sources(arch).into_iter().find(|source| source.file == file);
    found.with_context(|| format!("{file} is no source of production for {arch}"))
}

/// The buffers of a launch, by argument; 0 where an argument has none.
struct Buffers(Vec<sys::CUdeviceptr>);

impl Buffers {
    fn new(arguments: &[Argument]) -> Result<Self> {
        let mut buffers = Self(Vec::with_capacity(arguments.len()));
        for argument in arguments {
            let address = match argument {
                Argument::Input(bytes) | Argument::Weights(bytes) | Argument::Output(bytes)
                    if !bytes.is_empty() =>
                {
                    // SAFETY: given back in `drop`.
                    let address = unsafe { result::malloc_sync(bytes.len()) }?;
                    // SAFETY: as many bytes as were just reserved.
                    unsafe { result::memcpy_htod_sync(address, bytes) }?;
                    address
                }
                Argument::SameAs(argument) => buffers.0[*argument as usize],
                _ => 0,
            };
            buffers.0.push(address);
        }
        // Copies of pageable memory may be under way when the call returns, and the kernel's stream does not wait for them.
        result::ctx::synchronize()?;
        Ok(buffers)
    }

    /// The bytes of each of the kernel's parameters.
    fn parameters(&self, arguments: &[Argument]) -> Result<Vec<Vec<u8>>> {
        let mut parameters = Vec::new();
        let mut i = 0;
        while i < arguments.len() {
            let mut taken = 1;
            match &arguments[i] {
                Argument::Number(bytes) => parameters.push(bytes.clone()),
                Argument::Pointers(count) => {
                    let count = *count as usize;
                    ensure!(count <= RANKS, "{count} pointers in a structure of {RANKS}");
                    let mut pointers = [0_u64; RANKS];
                    pointers[..count].copy_from_slice(&self.0[i + 1..=i + count]);
                    parameters.push(pointers.iter().flat_map(|pointer| pointer.to_le_bytes()).collect());
                    taken += count;
                }
                Argument::WrittenLater { .. } => {}
                _ => parameters.push(self.0[i].to_le_bytes().into()),
            }
            i += taken;
        }
        Ok(parameters)
    }

    /// What is in the buffers that the kernel may change. That others are as before is checked.
    fn outputs(&self, arguments: &[Argument]) -> Result<Vec<u8>> {
        let mut outputs = Vec::new();
        for (index, (argument, &address)) in arguments.iter().zip(&self.0).enumerate() {
            let (Argument::Input(bytes) | Argument::Weights(bytes) | Argument::Output(bytes)) = argument
            else {
                continue;
            };
            let mut now = vec![0; bytes.len()];
            if address != 0 {
                // SAFETY: as many bytes as the buffer has.
                unsafe { result::memcpy_dtoh_sync(&mut now, address) }?;
            }
            match argument {
                Argument::Input(before) | Argument::Weights(before) if *before != now => {
                    bail!("argument {index}: a buffer that it may not change")
                }
                Argument::Input(_) | Argument::Weights(_) => {}
                _ => outputs.extend(now),
            }
        }
        Ok(outputs)
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        let mut addresses = self.0.clone();
        addresses.sort_unstable();
        addresses.dedup();
        for address in addresses.into_iter().filter(|address| *address != 0) {
            // SAFETY: reserved in `new`; the kernel is done with it.
            let _ = unsafe { result::free_sync(address) };
        }
    }
}

/// What somebody else does while the kernel waits, one after the other, on a stream of its own. Each write takes longer than the kernel
/// needs to begin, and flags come last. All of it is reserved before the kernel begins, because reserving may wait for the kernel.
struct Later {
    stream: sys::CUstream,
    writes: Vec<(sys::CUdeviceptr, &'static mut [u8])>,
}

impl Later {
    fn new(buffers: &Buffers, arguments: &[Argument]) -> Result<Self> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        let mut later = Self { stream, writes: Vec::new() };
        for argument in arguments {
            let Argument::WrittenLater { argument, first, bytes } = argument else { continue };
            // SAFETY: given back in `drop`, and as long as was asked for.
            let pinned = unsafe {
                let pinned = result::malloc_host(bytes.len(), 0)?.cast::<u8>();
                ptr::copy_nonoverlapping(bytes.as_ptr(), pinned, bytes.len());
                std::slice::from_raw_parts_mut(pinned, bytes.len())
            };
            later.writes.push((buffers.0[*argument as usize] + first, pinned));
        }
        Ok(later)
    }

    fn write(&self) -> Result<()> {
        for (to, bytes) in &self.writes {
            // SAFETY: the bytes lie in a live buffer, and stay where they are until they are there.
            unsafe {
                result::memcpy_htod_async(*to, bytes, self.stream)?;
                result::stream::synchronize(self.stream)?;
            }
        }
        Ok(())
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        // SAFETY: made and reserved in `new`; every copy was waited for.
        unsafe {
            for (_, bytes) in &mut self.writes {
                let _ = result::free_host(bytes.as_mut_ptr().cast());
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// The same way on stand-ins for CUDA's libraries: that launches get there, and their results back.
#[test]
fn launches_go_through_the_driver() {
    if is_left_out("stand-ins for the driver") {
        return;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["gemv::", "hash::", "patches::", "rotary::", "probes::a_block_votes"])
        .args(["reduce::", "attention_sm90::vision"])
        .env("LD_LIBRARY_PATH", super::libraries::folder())
        .env("LOCKSTEP_TEST_GPU", "0")
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    for test in
        ["gemv::few_rows_are_multiplied", "attention_sm90::vision_of_warpgroups_attends_inside_windows"]
    {
        assert!(report.contains(&format!("{test} ... ok")), "{report}");
    }
    assert!(!report.contains("left out on sm_"), "{report}");
}
