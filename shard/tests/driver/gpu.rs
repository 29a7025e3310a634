//! What the tests do with a GPU.

use std::{
    ffi::{CString, c_char, c_void},
    ptr,
    sync::{Condvar, Mutex},
};

use cudarc::{
    driver::sys::{
        CUcontext, CUdeviceptr, CUfunction, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
        CUlaunchConfig, CUmodule, CUresult, CUstream,
    },
    nvrtc::{
        result::{compile_program, create_program, destroy_program},
        sys::{nvrtcGetCUBIN, nvrtcGetCUBINSize},
    },
};

use super::libraries;

/// Which GPU is used for what.
pub mod number {
    pub const SHARED: i32 = 0;
    pub const PEER: i32 = 1;
    /// That of the first rank. The next ones are those of the ranks after it, up to four.
    pub const FIRST_RANK: i32 = 0;
    pub const FAILING_KERNEL: i32 = 4;
    pub const ILLEGAL_ADDRESS: i32 = 5;
    pub const OUT_OF_MEMORY: i32 = 6;
    pub const CAPTURE: i32 = 7;
    pub const ALL: i32 = 8;
}

pub const SUCCESS: CUresult = CUresult::CUDA_SUCCESS;

/// Makes a GPU the thread's current one.
pub fn enter(number: i32) -> CUcontext {
    libraries::load();
    enter_loaded(number)
}

/// The same where the libraries are found by their names.
pub fn enter_loaded(number: i32) -> CUcontext {
    let (mut device, mut context) = (0, ptr::null_mut());
    ok!(cuInit(0));
    ok!(cuDeviceGet(&mut device, number));
    ok!(cuDevicePrimaryCtxRetain(&mut context, device));
    ok!(cuCtxSetCurrent(context));
    context
}

pub fn stream() -> CUstream {
    let mut stream = ptr::null_mut();
    // One that does not wait for the null stream, nor it for this one.
    ok!(cuStreamCreate(&mut stream, 1));
    stream
}

pub fn synchronize(stream: CUstream) {
    ok!(cuStreamSynchronize(stream));
}

pub fn allocate(bytes: usize) -> CUdeviceptr {
    let mut address = 0;
    ok!(cuMemAlloc_v2(&mut address, bytes));
    address
}

pub fn upload<T: Copy>(elements: &[T]) -> CUdeviceptr {
    let address = allocate(size_of_val(elements));
    ok!(cuMemcpyHtoD_v2(address, elements.as_ptr().cast(), size_of_val(elements)));
    address
}

pub fn download<T: Copy + Default>(address: CUdeviceptr, count: usize) -> Vec<T> {
    let mut elements = vec![T::default(); count];
    ok!(cuMemcpyDtoH_v2(elements.as_mut_ptr().cast(), address, size_of_val(&elements[..])));
    elements
}

/// Pinned memory of the host.
pub struct Pinned {
    address: *mut u32,
    len: usize,
}

impl Pinned {
    pub fn new(elements: &[u32]) -> Self {
        let mut address = ptr::null_mut();
        ok!(cuMemHostAlloc(&mut address, size_of_val(elements), 0));
        let pinned = Self { address: address.cast(), len: elements.len() };
        pinned.write(elements);
        pinned
    }

    pub fn as_ptr(&self) -> *mut c_void {
        self.address.cast()
    }

    pub fn bytes(&self) -> usize {
        self.len * size_of::<u32>()
    }

    pub fn write(&self, elements: &[u32]) {
        assert_eq!(elements.len(), self.len);
        // SAFETY: the allocation has as many elements. A stream may read them meanwhile; that is what is tested.
        unsafe { ptr::copy_nonoverlapping(elements.as_ptr(), self.address, self.len) };
    }

    pub fn read(&self) -> Vec<u32> {
        // SAFETY: the allocation has as many elements, all written at its creation.
        (0..self.len).map(|i| unsafe { self.address.add(i).read_volatile() }).collect()
    }
}

/// Keeps a stream from going on until it is opened, which it is at the latest when it is dropped.
pub struct Gate(&'static Door);

#[derive(Default)]
struct Door {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// A gate that is the stream's next operation.
    pub fn new(stream: CUstream) -> Self {
        unsafe extern "C" fn pass(door: *mut c_void) {
            // SAFETY: it is the door below, which lives until the process ends.
            let door = unsafe { &*door.cast::<Door>() };
            drop(door.opened.wait_while(door.is_open.lock().unwrap(), |is_open| !*is_open).unwrap());
        }
        let door: &'static Door = Box::leak(Box::default());
        ok!(cuLaunchHostFunc(stream, Some(pass), ptr::from_ref(door).cast_mut().cast()));
        Self(door)
    }

    pub fn open(&self) {
        *self.0.is_open.lock().unwrap() = true;
        self.0.opened.notify_all();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

/// Compiles a source to an image.
pub fn image(source: &str) -> Vec<u8> {
    let program = create_program(&CString::new(source).unwrap(), None).unwrap();
    let mut bytes = 0;
    // SAFETY: the program exists until it is destroyed in the end, and the image has the size that it was asked for.
    unsafe {
        compile_program(program, &["--gpu-architecture=sm_90"]).unwrap();
        nvrtcGetCUBINSize(program, &mut bytes).result().unwrap();
        let mut image = vec![0_u8; bytes];
        nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()).result().unwrap();
        destroy_program(program).unwrap();
        image
    }
}

pub fn module(source: &str) -> CUmodule {
    let mut module = ptr::null_mut();
    ok!(cuModuleLoadData(&mut module, image(source).as_ptr().cast()));
    module
}

/// A kernel of the stand-in, which need not be in a source of its own.
pub fn kernel(name: &str) -> CUfunction {
    let module = module(&format!("extern \"C\" __global__ void {name}() {{}}"));
    let mut function = ptr::null_mut();
    ok!(cuModuleGetFunction(&mut function, module, CString::new(name).unwrap().as_ptr()));
    function
}

/// The addresses of arguments.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        [$(std::ptr::from_ref(&$argument).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(super) use arguments;

pub fn try_launch(
    function: CUfunction,
    grid: u32,
    block: u32,
    stream: CUstream,
    arguments: &mut [*mut c_void],
) -> CUresult {
    let values = arguments.as_mut_ptr();
    cuda!(cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, stream, values, ptr::null_mut()))
}

pub fn launch(function: CUfunction, grid: u32, block: u32, stream: CUstream, arguments: &mut [*mut c_void]) {
    assert_eq!(try_launch(function, grid, block, stream, arguments), SUCCESS);
}

/// The attribute of a launch that lets a kernel begin before the one before it has ended.
pub const BEGINS_EARLY: CUlaunchAttributeID =
    CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;

/// A launch of one block with an attribute.
pub fn launch_with(
    id: CUlaunchAttributeID,
    value: CUlaunchAttributeValue,
    function: CUfunction,
    block: u32,
    stream: CUstream,
    arguments: &mut [*mut c_void],
) -> CUresult {
    let mut attribute = CUlaunchAttribute { id, pad: [0; 4], value };
    let config = CUlaunchConfig {
        gridDimX: 1,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: stream,
        attrs: &mut attribute,
        numAttrs: 1,
    };
    cuda!(cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), ptr::null_mut()))
}

/// Launches a block of a kernel that may begin before the one before it has ended.
pub fn launch_early(function: CUfunction, block: u32, stream: CUstream, arguments: &mut [*mut c_void]) {
    let value = CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
    assert_eq!(launch_with(BEGINS_EARLY, value, function, block, stream, arguments), SUCCESS);
}
