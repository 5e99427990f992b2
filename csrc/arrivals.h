// Counters of arriving blocks for kernels that split a contraction: zero before and after each
// launch, so they are set to zero once and not by a memset for each call.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "ops.h"

namespace lorasb {

// Two launches that may run at the same time must not share counters. Launches of one stream run
// one after the other, and so do those that one CUDA graph captured from one stream, also when
// the graph is replayed on another: each stream and each capture of it has counters of its own.
// They are never given to another one, since a graph may be replayed at any later time.
class Arrivals {
 public:
  // MAX_ARRIVALS counters for a launch on `stream`, on the device of `like`. They are zeroed anew
  // if the device's are used up, or if none are there yet when the first launch is captured.
  static torch::stable::Tensor of(const torch::stable::Tensor& like, cudaStream_t stream) {
    static Arrivals arrivals;
    return arrivals.get(like, stream);
  }

 private:
  static constexpr int64_t SETS = 256;  // 1 MB

  using Tensor = torch::stable::Tensor;

  static Tensor zeros(const Tensor& like, int64_t rows) {
    return torch::stable::new_zeros(like, {rows, MAX_ARRIVALS},
                                    torch::headeronly::ScalarType::Int);
  }

  Tensor get(const Tensor& like, cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture);
    STD_TORCH_CHECK(error == cudaSuccess, "lorasb: the stream's capture state is unknown: ",
                    cudaGetErrorString(error));
    const bool capturing = status == cudaStreamCaptureStatusActive;
    if (!capturing) capture = 0;

    const std::lock_guard<std::mutex> guard(mutex_);
    Device& device = devices_[like.get_device_index()];
    if (!device.sets && !capturing) {
      device.sets.emplace(zeros(like, SETS));
      // Other streams will use them without waiting for this one.
      const cudaError_t zeroed = cudaStreamSynchronize(stream);
      STD_TORCH_CHECK(zeroed == cudaSuccess, "lorasb: ", cudaGetErrorString(zeroed));
    }
    const auto key = std::make_pair(stream, capture);
    auto found = device.owners.find(key);
    if (found == device.owners.end()) {
      const int64_t next = static_cast<int64_t>(device.owners.size());
      if (!device.sets || next == SETS) return zeros(like, 1);
      found = device.owners.emplace(key, next).first;
    }
    return torch::stable::narrow(*device.sets, 0, found->second, 1);
  }

  struct Device {
    std::optional<Tensor> sets;  // [SETS, MAX_ARRIVALS]
    std::map<std::pair<cudaStream_t, unsigned long long>, int64_t> owners;
  };

  std::mutex mutex_;
  std::map<int32_t, Device> devices_;
};

}  // namespace lorasb
