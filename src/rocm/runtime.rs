//! The HIP runtime, loaded when it is first asked for: a program with this backend in it starts on any machine.
//!
//! The functions below have had the same signatures in HIP 5, 6 and 7, with pointers, integers and enums of fixed values;
//! no struct crosses the boundary. So one binding serves all three, whatever the library's name ends in.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library;

use super::ROCM;
use crate::error::{Error, Result};
use crate::raw::rocm::{HipModuleLaunchKernel, RuntimeFunctions};

/// The names it goes by, newest first; the last is a development package's.
const NAMES: [&str; 4] = ["libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"];

/// `hipError_t` by number.
const HIP_SUCCESS: c_int = 0;
const HIP_OUT_OF_MEMORY: c_int = 2;
const HIP_NO_DEVICE: c_int = 100;
const HIP_INVALID_DEVICE: c_int = 101;

/// `hipMemcpyKind`: by what the pointers are.
const HIP_MEMCPY_DEFAULT: c_int = 4;
/// `hipStreamNonBlocking`: no order with the null stream.
const HIP_STREAM_NON_BLOCKING: c_uint = 1;
/// `hipEventDisableTiming`.
const HIP_EVENT_DISABLE_TIMING: c_uint = 2;
/// `hipHostRegisterPortable`: for all devices.
const HIP_HOST_REGISTER_PORTABLE: c_uint = 1;

macro_rules! runtime {
    ($($name:ident: $function:ident($($argument:ty),*) -> $result:ty;)*) => {
        /// The runtime's functions.
        pub(crate) struct Runtime {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// Holds the functions; never dropped.
            _library: Library,
            name: &'static str,
        }

        impl Runtime {
            fn of(library: Library, name: &'static str) -> Result<Self, String> {
                Ok(Runtime {
                    $($name: {
                        let symbol = concat!(stringify!($function), "\0");
                        // SAFETY: the signature is the one HIP's header has.
                        let function = unsafe { library.get(symbol.as_bytes()) };
                        *function.map_err(|_| format!("{name} has no {}", stringify!($function)))?
                    },)*
                    _library: library,
                    name,
                })
            }
        }
    };
}

runtime! {
    init: hipInit(c_uint) -> c_int;
    device_count: hipGetDeviceCount(*mut c_int) -> c_int;
    set_device: hipSetDevice(c_int) -> c_int;
    get_device: hipGetDevice(*mut c_int) -> c_int;
    device_name: hipDeviceGetName(*mut c_char, c_int, c_int) -> c_int;
    device_total_memory: hipDeviceTotalMem(*mut usize, c_int) -> c_int;
    device_attribute: hipDeviceGetAttribute(*mut c_int, c_int, c_int) -> c_int;
    error_text: hipGetErrorString(c_int) -> *const c_char;
    malloc: hipMalloc(*mut *mut c_void, usize) -> c_int;
    free: hipFree(*mut c_void) -> c_int;
    memset: hipMemsetAsync(*mut c_void, c_int, usize, *mut c_void) -> c_int;
    copy: hipMemcpyAsync(*mut c_void, *const c_void, usize, c_int, *mut c_void) -> c_int;
    host_register: hipHostRegister(*mut c_void, usize, c_uint) -> c_int;
    host_unregister: hipHostUnregister(*mut c_void) -> c_int;
    stream_create: hipStreamCreateWithFlags(*mut *mut c_void, c_uint) -> c_int;
    stream_destroy: hipStreamDestroy(*mut c_void) -> c_int;
    stream_synchronize: hipStreamSynchronize(*mut c_void) -> c_int;
    stream_wait_event: hipStreamWaitEvent(*mut c_void, *mut c_void, c_uint) -> c_int;
    stream_is_capturing: hipStreamIsCapturing(*mut c_void, *mut c_int) -> c_int;
    event_create: hipEventCreateWithFlags(*mut *mut c_void, c_uint) -> c_int;
    event_record: hipEventRecord(*mut c_void, *mut c_void) -> c_int;
    event_destroy: hipEventDestroy(*mut c_void) -> c_int;
    load_module: hipModuleLoadData(*mut *mut c_void, *const c_void) -> c_int;
    get_function: hipModuleGetFunction(*mut *mut c_void, *mut c_void, *const c_char) -> c_int;
    launch: hipModuleLaunchKernel(*mut c_void, u32, u32, u32, u32, u32, u32, u32, *mut c_void, *mut *mut c_void, *mut *mut c_void) -> c_int;
}

/// The runtime of this process.
///
/// # Errors
/// [`Error::NoDevice`] where there is none, or a part of one.
pub(crate) fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    let loaded = RUNTIME.get_or_init(load).as_ref();
    loaded.map_err(|reason| Error::NoDevice { backend: ROCM, reason: reason.clone() })
}

fn load() -> Result<Runtime, String> {
    // SAFETY: HIP's library, whose constructors any program that links it runs.
    let opened = NAMES.iter().find_map(|&name| Some((unsafe { Library::new(name) }.ok()?, name)));
    let Some((library, name)) = opened else {
        return Err(format!("no ROCm runtime: cannot load {}", NAMES.join(", ")));
    };
    Runtime::of(library, name).map_err(|missing| format!("no ROCm runtime: {missing}"))
}

impl Runtime {
    /// What the C library calls.
    pub(crate) fn for_library(&self) -> RuntimeFunctions {
        RuntimeFunctions {
            get_device: Some(self.get_device),
            get_attribute: Some(self.device_attribute),
            load_module: Some(self.load_module),
            get_function: Some(self.get_function),
            launch: Some(self.launch as HipModuleLaunchKernel),
            copy: Some(self.copy),
            error_text: Some(self.error_text),
        }
    }

    /// The runtime's file.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether a library that was linked with a runtime was linked with this one: streams and memory of one are nothing
    /// to another.
    #[cfg(feature = "decoder")]
    pub(crate) fn is_linked_by(&self, library: &Library) -> bool {
        // SAFETY: the signature is right, and the function is not called.
        let theirs = unsafe { library.get::<unsafe extern "C" fn(c_uint) -> c_int>(b"hipInit\0") };
        theirs.is_ok_and(|theirs| std::ptr::fn_addr_eq(*theirs, self.init))
    }

    /// A status of `call` in this crate's words.
    fn check(&self, call: &'static str, status: c_int) -> Result<()> {
        match status {
            HIP_SUCCESS => Ok(()),
            HIP_NO_DEVICE | HIP_INVALID_DEVICE => {
                Err(Error::NoDevice { backend: ROCM, reason: format!("no AMD device: {call}: {}", self.text(status)) })
            }
            _ => Err(Error::Device { backend: ROCM, call, code: status.into(), message: self.text(status) }),
        }
    }

    fn text(&self, status: c_int) -> String {
        // SAFETY: any number gets a static string, or null.
        let text = unsafe { (self.error_text)(status) };
        if text.is_null() {
            return format!("error {status}");
        }
        // SAFETY: not null, and ends with a zero byte.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Devices of this machine: at least one.
    ///
    /// # Errors
    /// [`Error::NoDevice`].
    pub(crate) fn count_devices(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: the count is written to.
        self.check("hipInit", unsafe { (self.init)(0) })?;
        // SAFETY: as above.
        self.check("hipGetDeviceCount", unsafe { (self.device_count)(&mut count) })?;
        match usize::try_from(count) {
            Ok(count) if count > 0 => Ok(count),
            _ => Err(Error::NoDevice { backend: ROCM, reason: "no AMD device: the runtime names none".to_owned() }),
        }
    }

    pub(super) fn device_name(&self, device: c_int) -> Result<String> {
        let mut name = [0 as c_char; 256];
        // SAFETY: as long as is said; one byte is left for an end.
        let status = unsafe { (self.device_name)(name.as_mut_ptr(), name.len() as c_int - 1, device) };
        self.check("hipDeviceGetName", status)?;
        // SAFETY: the last byte is zero.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    pub(super) fn total_memory_bytes(&self, device: c_int) -> Result<usize> {
        let mut bytes = 0;
        // SAFETY: the size is written to.
        self.check("hipDeviceTotalMem", unsafe { (self.device_total_memory)(&mut bytes, device) })?;
        Ok(bytes)
    }

    /// Makes the device current on this thread.
    pub(super) fn set_device(&self, device: c_int) -> Result<()> {
        // SAFETY: any number may be given.
        self.check("hipSetDevice", unsafe { (self.set_device)(device) })
    }

    /// `bytes` of memory on the current device; the address is a multiple of 256.
    pub(super) fn allocate(&self, what: &'static str, bytes: usize) -> Result<*mut c_void> {
        let mut address = std::ptr::null_mut();
        // SAFETY: the address is written to.
        match unsafe { (self.malloc)(&mut address, bytes) } {
            HIP_OUT_OF_MEMORY => Err(Error::OutOfMemory { what, bytes }),
            status => self.check("hipMalloc", status).map(|()| address),
        }
    }

    /// # Safety
    /// From [`Runtime::allocate`], freed once, with all uses done.
    pub(super) unsafe fn free(&self, address: *mut c_void) -> Result<()> {
        // SAFETY: the caller's.
        self.check("hipFree", unsafe { (self.free)(address) })
    }

    /// # Safety
    /// `bytes` of device memory at `address`, used in the order of `stream`.
    pub(super) unsafe fn clear(&self, address: *mut c_void, bytes: usize, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's.
        self.check("hipMemsetAsync", unsafe { (self.memset)(address, 0, bytes, stream) })
    }

    /// # Safety
    /// `bytes` at both addresses, valid until the stream has done the copy, device memory in its order.
    pub(super) unsafe fn copy(
        &self,
        dst: *mut c_void,
        src: *const c_void,
        bytes: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: the caller's.
        self.check("hipMemcpyAsync", unsafe { (self.copy)(dst, src, bytes, HIP_MEMCPY_DEFAULT, stream) })
    }

    /// # Safety
    /// Memory of this process that is unlocked before it is freed.
    pub(super) unsafe fn page_lock(&self, address: *mut c_void, bytes: usize) -> Result<()> {
        // SAFETY: the caller's.
        self.check("hipHostRegister", unsafe { (self.host_register)(address, bytes, HIP_HOST_REGISTER_PORTABLE) })
    }

    /// # Safety
    /// Locked before, by this address.
    pub(super) unsafe fn page_unlock(&self, address: *mut c_void) -> Result<()> {
        // SAFETY: the caller's.
        self.check("hipHostUnregister", unsafe { (self.host_unregister)(address) })
    }

    /// A stream of the current device.
    pub(super) fn create_stream(&self) -> Result<*mut c_void> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: the stream is written to.
        self.check("hipStreamCreateWithFlags", unsafe { (self.stream_create)(&mut stream, HIP_STREAM_NON_BLOCKING) })?;
        Ok(stream)
    }

    /// # Safety
    /// From [`Runtime::create_stream`], destroyed once.
    pub(super) unsafe fn destroy_stream(&self, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's.
        self.check("hipStreamDestroy", unsafe { (self.stream_destroy)(stream) })
    }

    /// # Safety
    /// A live stream.
    pub(super) unsafe fn synchronize(&self, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's.
        self.check("hipStreamSynchronize", unsafe { (self.stream_synchronize)(stream) })
    }

    /// # Safety
    /// A live stream.
    pub(super) unsafe fn is_capturing(&self, stream: *mut c_void) -> Result<bool> {
        let mut status = 0;
        // SAFETY: the caller's; the status is written to.
        self.check("hipStreamIsCapturing", unsafe { (self.stream_is_capturing)(stream, &mut status) })?;
        Ok(status != 0)
    }

    /// Work enqueued on `later` from now on waits for what is on `earlier` now.
    ///
    /// # Safety
    /// Live streams of the current device.
    pub(super) unsafe fn order(&self, earlier: *mut c_void, later: *mut c_void) -> Result<()> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the event is written to.
        self.check("hipEventCreateWithFlags", unsafe { (self.event_create)(&mut event, HIP_EVENT_DISABLE_TIMING) })?;
        // SAFETY: an event of the current device, and the caller's streams.
        let recorded = self.check("hipEventRecord", unsafe { (self.event_record)(event, earlier) });
        // SAFETY: as above.
        let waits = recorded
            .and_then(|()| self.check("hipStreamWaitEvent", unsafe { (self.stream_wait_event)(later, event, 0) }));
        // SAFETY: created above, destroyed once; the runtime keeps it until nothing waits for it.
        let destroyed = self.check("hipEventDestroy", unsafe { (self.event_destroy)(event) });
        waits.and(destroyed)
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Runtime({})", self.name)
    }
}
