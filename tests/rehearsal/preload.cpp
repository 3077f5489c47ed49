// LD_PRELOADed in front of a CUDA build of torch, on a machine with or without a driver: there is one device, number 0.
// Built with the name libcuda.so.1, so that it is also the driver that torch finds.
#include <cstdint>
#include <optional>

#define EXPORT __attribute__((visibility("default")))

namespace c10 {
using DeviceIndex = int8_t;
namespace cuda {
EXPORT DeviceIndex device_count() noexcept { return 1; }
EXPORT DeviceIndex device_count_ensure_non_zero() { return 1; }
EXPORT DeviceIndex current_device() { return 0; }
EXPORT void set_device(DeviceIndex, bool) {}
EXPORT void device_synchronize() {}
EXPORT bool hasPrimaryContext(DeviceIndex) { return true; }
EXPORT std::optional<DeviceIndex> getDeviceIndexWithPrimaryContext() { return DeviceIndex(0); }
namespace _internal {
EXPORT bool hasPrimaryContext(DeviceIndex) { return true; }
}  // namespace _internal
}  // namespace cuda
}  // namespace c10

extern "C" EXPORT int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return 0;
}
