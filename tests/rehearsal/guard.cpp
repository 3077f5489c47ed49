// A CUDA device for torch where there is none: devices, streams and events can be told apart, and waits that a capture
// must not have are counted. Nothing is behind them. torch asks its "device guard" for all of these, also in the autograd engine's threads.
//
// For a CPU build of torch (CPU_BUILD 1) it also answers what the CUDA library would; a CUDA build has that library, and
// needs preload.cpp in front of it. TORCH_MINOR: 11 for torch 2.11.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <utility>
#include <vector>

namespace {

thread_local int64_t current = 0;   // stream
std::mutex mutex;                   // of the three below: autograd has threads
int64_t capturing = -1;             // stream, or -1
int strays = 0;                     // waits since the capture began, except of its stream for itself
std::vector<int64_t> events(1, 0);  // event -> the stream it was recorded on; 0 is no event

void wait(int64_t waiting, int64_t waited_for) { strays += waiting != capturing || waited_for != capturing; }

c10::Device device() { return c10::Device(c10::DeviceType::CUDA, 0); }
c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, device(), id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(current); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(current); }
  c10::Stream exchangeStream(c10::Stream s) const override { return stream(std::exchange(current, s.id())); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
#if TORCH_MINOR >= 13
  bool isStreamCapturing(const c10::Stream& s) const override { return s.id() == capturing; }
#endif

  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard<std::mutex> lock(mutex);
    events.push_back(s.id());
    *event = reinterpret_cast<void*>(events.size() - 1);
  }
  void block(void* event, const c10::Stream& s) const override {
    std::lock_guard<std::mutex> lock(mutex);
    wait(s.id(), events[reinterpret_cast<size_t>(event)]);
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

Guard guard;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);

#if CPU_BUILD
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
#endif

}  // namespace

// What device.py calls.
extern "C" void guard_set_stream(int64_t id) { current = id; }
extern "C" int64_t guard_stream() { return current; }  // of the thread that asks
extern "C" void guard_wait(int64_t waiting, int64_t waited_for) {
  std::lock_guard<std::mutex> lock(mutex);
  wait(waiting, waited_for);
}
// Begin to capture the stream, or end it with -1. Returns the number of strays since the last call.
extern "C" int guard_capture(int64_t id) {
  std::lock_guard<std::mutex> lock(mutex);
  capturing = id;
  return std::exchange(strays, 0);
}
