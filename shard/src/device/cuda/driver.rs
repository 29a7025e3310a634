//! The part of CUDA's driver that the device uses: a GPU's context with one stream, memory, events and launches.
//!
//! All of it belongs to the thread that opened the GPU. What the stream was given may run later: memory that it reads or
//! writes must live until then, which [`Gpu`] and its buffers see to by waiting for the stream before memory is given back.
#![allow(unsafe_code)]

use std::{
    cell::{Cell, RefCell},
    ffi::{CStr, CString, c_void},
    ptr,
    rc::Rc,
    sync::Arc,
};

use cudarc::driver::{DriverError, result, sys};

use super::kernels::begins_early;
use super::milestones::Milestones;
use crate::device::{DeviceError, Result};
use crate::progress::Progress;

/// An address in the GPU's memory.
pub type Address = u64;

/// A GPU that is open, and the stream that everything runs on.
pub struct Gpu {
    device: sys::CUdevice,
    stream: sys::CUstream,
    /// See [`Gpu::let_kernels_begin_early`].
    kernels_begin_early: Cell<bool>,
    /// None where nobody wants to know, and while calls are kept as a graph.
    milestones: RefCell<Option<Milestones>>,
}

/// The first compute capability whose kernels can wait for the one before them, and the first driver that keeps that in graphs, as
/// drivers count.
const EARLY_MAJOR: i32 = 9;
const EARLY_DRIVER: i32 = 12_030;

/// Looks at what is waited for between two looks at what else there is.
const LOOKS: usize = 64;

/// Says what failed.
pub fn failed(what: &str) -> impl Fn(DriverError) -> DeviceError + '_ {
    move |error| {
        let words = |words: std::result::Result<&CStr, DriverError>| {
            words.map_or_else(|_| format!("{:?}", error.0), |words| words.to_string_lossy().into_owned())
        };
        DeviceError::Failed(format!(
            "{what}: {} ({})",
            words(error.error_string()),
            words(error.error_name())
        ))
    }
}

impl Gpu {
    /// Opens GPU `ordinal`, and makes it the calling thread's. The driver was found to be there, and has been initialised.
    ///
    /// # Errors
    /// The driver cannot open it.
    pub fn open(ordinal: i32) -> Result<Rc<Self>> {
        let device = result::device::get(ordinal).map_err(failed("cannot find the GPU"))?;
        // SAFETY: the device was found above; the context is given back once, in `drop`.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(failed("cannot open the GPU"))?;
        // SAFETY: the context was just made, and is kept until this is dropped.
        unsafe { result::ctx::set_current(context) }.map_err(failed("cannot use the GPU"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("cannot create a stream"))?;
        Ok(Rc::new(Self {
            device,
            stream,
            kernels_begin_early: Cell::new(false),
            milestones: RefCell::default(),
        }))
    }

    /// The driver's number of the GPU in this process.
    pub fn device(&self) -> sys::CUdevice {
        self.device
    }

    /// From now on it is counted how far the GPU is, by whoever waits for it.
    pub fn count_in(&self, progress: Arc<Progress>) {
        self.milestones.replace(Some(Milestones::new(self.stream, progress)));
    }

    /// Counts how far the GPU is.
    pub fn look(&self) {
        if let Some(milestones) = &mut *self.milestones.borrow_mut() {
            milestones.look();
        }
    }

    /// Something was launched.
    fn launched(&self) -> Result<()> {
        self.milestones.borrow_mut().as_mut().map_or(Ok(()), Milestones::launched)
    }

    /// Returns when `is_over` holds. Meanwhile it counts how far the GPU is, and does `look` again and again, whose error ends the
    /// wait.
    ///
    /// # Errors
    /// That of either.
    pub fn wait_until(
        &self,
        is_over: impl Fn() -> Result<bool>,
        look: impl Fn() -> Result<()>,
    ) -> Result<()> {
        loop {
            for _ in 0..LOOKS {
                if is_over()? {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            self.look();
            look()?;
            // Where threads are more than processors, somebody may have to do what is waited for.
            std::thread::yield_now();
        }
    }

    /// The driver's name for the stream.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// A number that the driver knows of the GPU.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32> {
        // SAFETY: the device is one of the driver's.
        unsafe { result::device::get_attribute(self.device, attribute) }
            .map_err(failed("cannot ask for an attribute of the GPU"))
    }

    /// Bytes of its memory: free ones, and all.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        let (free, total) = result::mem_get_info().map_err(failed("cannot ask for the GPU's free memory"))?;
        Ok((free as u64, total as u64))
    }

    /// Where the GPU is on the PCI bus, as in `0000:1b:00.0`.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn pci_bus_id(&self) -> Result<String> {
        let mut name = [0_u8; 32];
        // SAFETY: the driver writes at most as many bytes as it is told, the last one zero.
        unsafe { sys::cuDeviceGetPCIBusId(name.as_mut_ptr().cast(), name.len() as i32, self.device) }
            .result()
            .map_err(failed("cannot ask where the GPU is"))?;
        let name =
            CStr::from_bytes_until_nul(&name).map_err(|error| DeviceError::Failed(error.to_string()))?;
        Ok(name.to_string_lossy().to_lowercase())
    }

    /// Waits until the stream has done all that it was given.
    ///
    /// # Errors
    /// Something of it failed, at any time since the last wait.
    pub fn synchronize(&self) -> Result<()> {
        self.wait_until(|| self.is_idle(), || Ok(()))
    }

    /// Whether the stream has done all that it was given.
    ///
    /// # Errors
    /// Something of it failed.
    pub fn is_idle(&self) -> Result<bool> {
        // SAFETY: the stream lives as long as this.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(failed("the GPU failed")(DriverError(error))),
        }
    }

    /// Sets bytes, in the stream's order.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: callers name memory of their own buffers, which outlive the stream's work.
        unsafe { result::memset_d8_async(to, byte, bytes, self.stream) }.map_err(failed("cannot fill memory"))
    }

    /// Copies bytes within the GPU, in the stream's order.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: callers name memory of their own buffers, which outlive the stream's work.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(failed("cannot copy memory"))
    }

    /// Whether kernels that wait for the one before them ([`begins_early`]) are launched so that they may begin before it has
    /// ended, from now on. A GPU or a driver that cannot do so is not asked to.
    ///
    /// # Errors
    /// The driver does not tell what it and the GPU are.
    pub fn let_kernels_begin_early(&self, is_wanted: bool) -> Result<()> {
        let major = self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let mut driver = 0;
        // SAFETY: it writes one number.
        unsafe { sys::cuDriverGetVersion(&mut driver) }
            .result()
            .map_err(failed("cannot ask for the driver"))?;
        self.kernels_begin_early.set(is_wanted && major >= EARLY_MAJOR && driver >= EARLY_DRIVER);
        Ok(())
    }

    /// Launches a kernel, in the stream's order. Of each argument there is the place of its value.
    ///
    /// # Safety
    /// The values are of the types that the kernel declares and live during the call, and what it reads and writes by them is
    /// memory of live buffers.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn launch(
        &self,
        function: &Function,
        grid: [usize; 3],
        block: usize,
        shared_bytes: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let [x, y, z] = grid.map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
        let mut begins_early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: self.stream,
            attrs: &mut begins_early,
            numAttrs: u32::from(function.begins_early && self.kernels_begin_early.get()),
        };
        // SAFETY: the driver copies as many bytes of each value as the kernel declares before it returns, and the attribute; the
        // rest is this function's own condition. A kernel that may begin early waits before it touches what others write.
        unsafe {
            sys::cuLaunchKernelEx(&config, function.raw, arguments.as_mut_ptr(), ptr::null_mut()).result()
        }
        .map_err(|error| failed(&format!("cannot launch {}", function.name))(error))?;
        self.launched()
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.milestones.take();
        // The process ends, or goes on without this GPU: nobody is left to tell of an error.
        // SAFETY: both were made in `open`, and are given back once.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// A loaded cubin.
pub struct Module {
    raw: sys::CUmodule,
    _gpu: Rc<Gpu>,
}

/// A kernel of a module, which must live as long.
pub struct Function {
    raw: sys::CUfunction,
    name: String,
    begins_early: bool,
}

impl Module {
    /// Loads a cubin.
    ///
    /// # Errors
    /// It is not for this GPU, or the driver is too old for it.
    pub fn load(gpu: &Rc<Gpu>, name: &str, cubin: &[u8]) -> Result<Self> {
        // SAFETY: the driver reads an ELF image by its own header, and the image is one that NVRTC made.
        let raw = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
            .map_err(|error| failed(&format!("cannot load the kernels of {name}"))(error))?;
        Ok(Self { raw, _gpu: gpu.clone() })
    }

    /// One of its kernels. `shared_bytes` is how much shared memory its launches ask for at most.
    ///
    /// # Errors
    /// There is none of this name, or the GPU has less shared memory.
    pub fn function(&self, name: &str, shared_bytes: usize) -> Result<Function> {
        let in_c = CString::new(name).map_err(|error| DeviceError::Failed(error.to_string()))?;
        // SAFETY: the module is loaded.
        let raw = unsafe { result::module::get_function(self.raw, in_c) }
            .map_err(|error| failed(&format!("there is no kernel {name}"))(error))?;
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a loaded module.
            unsafe { result::function::set_function_attribute(raw, attribute, shared_bytes as i32) }
                .map_err(|error| {
                    failed(&format!("{name} has no {shared_bytes} bytes of shared memory"))(error)
                })?;
        }
        Ok(Function { raw, name: name.to_owned(), begins_early: begins_early(name) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, and unloaded once; the GPU is still open.
        let _ = unsafe { result::module::unload(self.raw) };
    }
}

/// Dynamic shared memory that a launch may ask for without having said so before.
const DEFAULT_SHARED_BYTES: usize = 48 << 10;

/// Memory of the GPU.
pub struct DeviceBuffer {
    address: Address,
    bytes: usize,
    /// What it is a part of, which lives as long.
    whole: Option<Rc<DeviceBuffer>>,
    gpu: Rc<Gpu>,
}

impl DeviceBuffer {
    /// Reserves memory for `purpose`. A buffer of no bytes has no address.
    ///
    /// # Errors
    /// The GPU has no more.
    pub fn new(gpu: &Rc<Gpu>, bytes: usize, purpose: &str) -> Result<Self> {
        let address = if bytes == 0 {
            0
        } else {
            // SAFETY: the memory is given back once, in `drop`.
            unsafe { result::malloc_sync(bytes) }.map_err(|error| {
                failed(&format!("cannot reserve {bytes} bytes of the GPU's memory for {purpose}"))(error)
            })?
        };
        Ok(Self { address, bytes, whole: None, gpu: gpu.clone() })
    }

    /// A part of a buffer.
    ///
    /// # Panics
    /// It goes beyond it.
    pub fn part_of(whole: &Rc<DeviceBuffer>, offset: usize, bytes: usize) -> Self {
        assert!(offset + bytes <= whole.bytes, "{bytes} bytes from {offset} on of {}", whole.bytes);
        let address = whole.address + offset as Address;
        Self { address, bytes, whole: Some(whole.clone()), gpu: whole.gpu.clone() }
    }

    /// Where it is.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.bytes == 0 || self.whole.is_some() {
            return;
        }
        // What the stream still does with it comes first. An error of that has been told, or will be by the next wait.
        let _ = self.gpu.synchronize();
        // SAFETY: reserved in `new`, and given back once.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Memory of the host that the GPU copies from and to by itself.
pub struct PinnedBuffer {
    start: ptr::NonNull<u8>,
    bytes: usize,
    gpu: Rc<Gpu>,
}

impl PinnedBuffer {
    /// Reserves memory, of zeros.
    ///
    /// # Errors
    /// The host has no more that can be pinned.
    pub fn new(gpu: &Rc<Gpu>, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(1);
        // SAFETY: the memory is given back once, in `drop`.
        let start = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| failed(&format!("cannot pin {bytes} bytes of memory"))(error))?;
        let start = ptr::NonNull::new(start.cast::<u8>())
            .ok_or_else(|| DeviceError::Failed("pinned memory at address zero".into()))?;
        // SAFETY: it is as long as was asked for.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Ok(Self { start, bytes, gpu: gpu.clone() })
    }

    /// Its bytes. None of them may be on their way to or from the GPU.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory lives as long as this, and has been initialised.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// Its bytes. None of them may be on their way to or from the GPU.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the memory lives as long as this, has been initialised, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// Has the stream copy `bytes` from `offset` on to the GPU.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn send(&self, offset: usize, bytes: usize, to: Address) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let from = &self.as_slice()[offset..offset + bytes];
        // SAFETY: the buffer waits for the stream before it is given back.
        unsafe { result::memcpy_htod_async(to, from, self.gpu.stream) }
            .map_err(failed("cannot copy to the GPU"))
    }

    /// Has the stream copy `bytes` from the GPU to `offset`.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn receive(&mut self, from: Address, offset: usize, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.gpu.stream;
        let to = &mut self.as_mut_slice()[offset..offset + bytes];
        // SAFETY: the buffer waits for the stream before it is given back.
        unsafe { result::memcpy_dtoh_async(to, from, stream) }.map_err(failed("cannot copy from the GPU"))
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let _ = self.gpu.synchronize();
        // SAFETY: reserved in `new`, and given back once.
        let _ = unsafe { result::free_host(self.start.as_ptr().cast()) };
    }
}

/// What some calls gave the stream, to be done at once, as often as wanted.
pub struct Graph {
    raw: sys::CUgraphExec,
    gpu: Rc<Gpu>,
}

impl Graph {
    /// Keeps what `work` gives the stream, which does nothing of it now. `work` must not wait for the stream, nor give it
    /// anything that lasts less long than the graph.
    ///
    /// # Errors
    /// `work` fails, or does what cannot be kept.
    pub fn capture<T>(gpu: &Rc<Gpu>, work: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        // Other calls of this thread are as free as ever: libraries reserve memory when they like.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives, and the capture is ended below, whatever `work` gives.
        unsafe { result::stream::begin_capture(gpu.stream, mode) }.map_err(failed("cannot keep a step"))?;
        // Milestones are of the stream and not of the graph.
        let milestones = gpu.milestones.take();
        let done = work();
        gpu.milestones.replace(milestones);
        // SAFETY: a capture was begun above.
        let captured = unsafe { result::stream::end_capture(gpu.stream) }.map(Captured);
        let done = done?;
        let graph = captured.map_err(failed("a step cannot be kept"))?;
        let mut raw = ptr::null_mut();
        // SAFETY: the graph was just made, and what is made of it does not need it afterwards.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut raw, graph.0, 0) }.result();
        made.map_err(failed("a step cannot be made ready to be repeated"))?;
        let graph = Self { raw, gpu: gpu.clone() };
        // What it takes of the GPU's memory is taken now: a launch is too late to do without it.
        // SAFETY: both live.
        unsafe { sys::cuGraphUpload(raw, gpu.stream) }
            .result()
            .map_err(failed("there is no room for a step that is repeated"))?;
        Ok((graph, done))
    }

    /// Has the stream do it all.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn launch(&self) -> Result<()> {
        // SAFETY: both live.
        unsafe { result::graph::launch(self.raw, self.gpu.stream) }
            .map_err(failed("cannot repeat a step"))?;
        self.gpu.launched()
    }
}

/// What was kept, to make a [`Graph`] of.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: made once, and given back once.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.gpu.synchronize();
        // SAFETY: made once, and given back once, when the stream does not need it any more.
        let _ = unsafe { result::graph::exec_destroy(self.raw) };
    }
}

/// A point in the stream's work.
pub struct Event {
    raw: sys::CUevent,
    gpu: Rc<Gpu>,
}

impl Event {
    /// An event that has come.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn new(gpu: &Rc<Gpu>) -> Result<Self> {
        let raw = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(failed("cannot create an event"))?;
        Ok(Self { raw, gpu: gpu.clone() })
    }

    /// From now on the event is when all is done that the stream was given before.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn record(&self) -> Result<()> {
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.raw, self.gpu.stream) }.map_err(failed("cannot record an event"))
    }

    /// Whether the event has come.
    ///
    /// # Errors
    /// What came before it failed.
    pub fn has_come(&self) -> Result<bool> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(failed("the GPU failed")(DriverError(error))),
        }
    }

    /// Waits for the event.
    ///
    /// # Errors
    /// What came before it failed.
    pub fn wait(&self) -> Result<()> {
        self.gpu.wait_until(|| self.has_come(), || Ok(()))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once, and destroyed once.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}
