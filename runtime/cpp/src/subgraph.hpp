// One ONNX graph in one onnxruntime session: the C++ side of runtime/subgraph.py. Every onnxruntime option of the
// runtime is in this file.
//
// Sessions run one after the other. Threads that sleep between operators cost a third of the decode speed on an idle
// machine. Threads that spin without limit take the cores from the next session and from other programs. So they spin
// for microseconds and only inside a run; if this onnxruntime cannot bound that, they do not spin (measured,
// docs/design-notes.md).
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cancellation.hpp"
#include "errors.hpp"
#include "log.hpp"
#include "manifest.hpp"
#include "onnxruntime.hpp"
#include "usable_cores.hpp"

namespace autosteer {

constexpr int kSpinUs = 50;  // an idle thread's wait for the next operator; most come sooner

/// Throws ProviderError if this onnxruntime is older than `lowest` ("1.23"), which the package needs.
inline void require_onnxruntime(const std::string& lowest, const char* installed = onnxruntime_version()) {
  if (version_numbers(installed) < version_numbers(lowest.c_str())) {
    throw ProviderError("this package needs onnxruntime " + lowest + " or newer; " + installed + " is installed");
  }
}

/// Whether an onnxruntime can bound how long threads spin.
inline bool can_bound_spinning(const char* version = onnxruntime_version()) {
  return version_numbers(version) >= std::pair(1, 26);
}

constexpr int64_t kThreadsACpu = 4;  // more make nothing faster, and onnxruntime hangs where the system gives none

/// The threads of an engine that was asked for `threads`; 0: one for each CPU that this process may use. Throws
/// OptionError for more than kThreadsACpu for each CPU of the machine.
inline int threads_for(int64_t threads) {
  const int64_t most = kThreadsACpu * std::max(sysconf(_SC_NPROCESSORS_ONLN), 1L);
  if (threads < 0 || threads > most) {
    throw OptionError("threads", " = " + std::to_string(threads) + " is out of range (from 1 to " +
                                     std::to_string(most) + ", " + std::to_string(kThreadsACpu) +
                                     " for each CPU of this machine)");
  }
  return threads > 0 ? static_cast<int>(threads) : usable_cores();
}

/// onnxruntime's environment for the sessions of an engine: `threads` threads, and one arena of memory for all sessions
/// of the process, which grows by the size requested.
///
/// If spinning cannot be bounded, all sessions of the process share one pool whose threads do not spin. A process has
/// only one such environment: if it exists already, its pool and its number of threads are used.
class Environment {
 public:
  explicit Environment(int threads) : threads_(threads), environment_(make(threads)) {
    const Ort::ArenaCfg arena(0, /*kSameAsRequested*/ 1, -1, -1);
    environment_.DisableTelemetryEvents();  // a host may not want it; and its variable is not ours to set
    environment_.CreateAndRegisterAllocator(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault), arena);
  }

  /// Throws Ort::Exception if onnxruntime cannot load the graph.
  Ort::Session load(const fs::path& graph) const {
    Ort::SessionOptions options;
    if (can_bound_spinning()) {
      options.SetIntraOpNumThreads(threads_);
      options.SetInterOpNumThreads(1);
      options.AddConfigEntry("session.intra_op.allow_spinning", "1");
      options.AddConfigEntry("session.intra_op.spin_duration_us", std::to_string(kSpinUs).c_str());
      options.AddConfigEntry("session.force_spinning_stop", "1");  // free the cores for the next session
    } else {
      options.DisablePerSessionThreads();
    }
    options.DisableMemPattern();  // a pattern for each input length would hold memory
    options.AddConfigEntry("session.use_env_allocators", "1");
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
    return {environment_, graph.c_str(), options};
  }

 private:
  static Ort::Env make(int threads) {
    if (can_bound_spinning()) return {ORT_LOGGING_LEVEL_ERROR, "autosteer", forward, nullptr};
    Ort::ThreadingOptions pool;
    pool.SetGlobalIntraOpNumThreads(threads);
    pool.SetGlobalInterOpNumThreads(1);
    pool.SetGlobalSpinControl(0);
    return {pool, forward, nullptr, ORT_LOGGING_LEVEL_ERROR, "autosteer"};
  }

  /// onnxruntime's log goes where ours goes, never to the host's stderr.
  static void ORT_API_CALL forward(void*, OrtLoggingLevel, const char*, const char*, const char*, const char* message) {
    try {
      log_line(std::string("onnxruntime: ") + message);
    } catch (...) {  // no memory: onnxruntime's C code must not see it
    }
  }

  int threads_;
  Ort::Env environment_;
};

/// An array of T on the CPU, zero at first, and onnxruntime's view of it. Pages that are not written take no memory.
template <class T>
class Tensor {
 public:
  explicit Tensor(std::vector<int64_t> shape) : shape_(std::move(shape)) {
    size_t size = 1;
    for (const int64_t n : shape_) {
      if (n < 0 || __builtin_mul_overflow(size, static_cast<size_t>(n), &size)) throw std::bad_alloc();
    }
    size_ = size;
    data_.reset(static_cast<T*>(std::calloc(std::max<size_t>(size, 1), sizeof(T))));
    if (!data_) throw std::bad_alloc();
    value_ = view(data_.get(), shape_);
  }

  Tensor(std::vector<int64_t> shape, std::initializer_list<T> values) : Tensor(std::move(shape)) {
    std::copy(values.begin(), values.end(), data_.get());
  }

  /// onnxruntime's view of an array that the caller keeps alive.
  static Ort::Value view(const T* data, const std::vector<int64_t>& shape) {
    static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const int64_t size = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    return Ort::Value::CreateTensor<T>(memory, const_cast<T*>(data), static_cast<size_t>(size), shape.data(),
                                       shape.size());
  }

  T* data() const { return data_.get(); }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  const std::vector<int64_t>& shape() const { return shape_; }
  const Ort::Value& value() const { return value_; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::vector<int64_t> shape_;
  size_t size_ = 0;
  std::unique_ptr<T, Free> data_;
  Ort::Value value_{nullptr};
};

/// Whether onnxruntime says so that memory ran out: of an allocation, or of a file that is mapped.
inline bool is_no_memory(const std::string& what) {
  for (const char* said : {"bad_alloc", "llocate memory"}) {
    if (what.find(said) != std::string::npos) return true;
  }
  return false;
}

/// A loaded graph.
class Subgraph {
 public:
  /// Throws PackageError if `path` is not a usable graph, or its inputs and outputs are not the manifest's; Error if
  /// memory runs out.
  Subgraph(const Environment& environment, const fs::path& path, const GraphSpec& spec) : path_(path) {
    try {
      session_ = environment.load(path);
    } catch (const Ort::Exception& err) {
      const std::string what = err.what(), line = what.substr(0, what.find('\n'));
      if (is_no_memory(what)) throw Error(path.string() + ": not enough memory to load it (" + line + ")");
      throw PackageError(path.string() + ": onnxruntime cannot load it (" + line + ")");
    }
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<TensorSpec> inputs, outputs;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      inputs_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
      inputs.push_back(described(inputs_.back(), session_.GetInputTypeInfo(i)));
    }
    for (size_t i = 0; i < session_.GetOutputCount(); ++i) {
      outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
      outputs.push_back(described(outputs_.back(), session_.GetOutputTypeInfo(i)));
    }
    if (inputs != spec.inputs || outputs != spec.outputs) {
      throw PackageError(path.string() + ": its inputs or outputs are not those of the manifest; export it again");
    }
  }

  /// Run a graph of one input (Manifest::load checks that); outputs by name. The arena then frees its unused memory:
  /// image graphs take the most, and may not run again.
  std::map<std::string, Ort::Value> run(const Ort::Value& input) const {
    std::vector<const char*> outputs;
    for (const auto& name : outputs_) outputs.push_back(name.c_str());
    const char* name = inputs_[0].c_str();
    std::vector<Ort::Value> made =
        session_.Run(Cancellation::shrinking(), &name, &input, 1, outputs.data(), outputs.size());
    std::map<std::string, Ort::Value> named;
    for (size_t i = 0; i < made.size(); ++i) named.emplace(outputs_[i], std::move(made[i]));
    return named;
  }

  Ort::Session& session() const { return session_; }
  const fs::path& path() const { return path_; }

 private:
  static TensorSpec described(const std::string& name, const Ort::TypeInfo& type) {
    if (type.GetONNXType() != ONNX_TYPE_TENSOR) return {name, "", {}};
    static const std::map<ONNXTensorElementDataType, std::string> types = {
        {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32"}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "float16"},
        {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "int64"},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, "int32"},
        {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "uint8"},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, "int8"},
        {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, "bool"}};
    const auto info = type.GetTensorTypeAndShapeInfo();
    const auto sizes = info.GetShape();
    std::vector<const char*> symbols(sizes.size());
    info.GetSymbolicDimensions(symbols.data(), symbols.size());
    TensorSpec spec{name, "", {}};
    if (const auto known = types.find(info.GetElementType()); known != types.end()) spec.dtype = known->second;
    for (size_t i = 0; i < sizes.size(); ++i) {
      spec.shape.push_back(sizes[i] < 0 ? Dimension(std::string(symbols[i])) : Dimension(sizes[i]));
    }
    return spec;
  }

  fs::path path_;
  mutable Ort::Session session_{nullptr};  // Run is thread-safe, though not declared const
  std::vector<std::string> inputs_, outputs_;
};

/// A graph's output as an array and its length. Throws PackageError for another type.
template <class T>
std::pair<const T*, int64_t> values(const Ort::Value& value, const Subgraph& graph) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  if (info.GetElementType() != Ort::TypeToTensorType<T>::type) {
    throw PackageError(graph.path().string() + ": its output has not the type that this runtime reads");
  }
  return {value.GetTensorData<T>(), static_cast<int64_t>(info.GetElementCount())};
}

/// A graph's output of `count` floats. Throws PackageError for another type or count.
inline const float* floats(const Ort::Value& value, int64_t count, const Subgraph& graph) {
  const auto [data, found] = values<float>(value, graph);
  if (found != count)
    throw PackageError(graph.path().string() + ": its output has not the size that the manifest implies");
  return data;
}

/// A graph bound to fixed buffers. Each call runs it once, without look-ups or copies.
class Call {
 public:
  using Bound = std::vector<std::pair<std::string, const Ort::Value*>>;

  Call(const Subgraph& graph, const Bound& inputs, const Bound& outputs)
      : session_(graph.session()), binding_(session_) {
    for (const auto& [name, value] : inputs) binding_.BindInput(name.c_str(), *value);
    for (const auto& [name, value] : outputs) binding_.BindOutput(name.c_str(), *value);
  }

  /// Another buffer for an input, whose shape differs from run to run.
  void bind(const char* input, const Ort::Value& value) { binding_.BindInput(input, value); }

  /// Run; results are in the output buffers.
  void operator()(const Ort::RunOptions& options = Cancellation::plain()) { session_.Run(options, binding_); }

 private:
  Ort::Session& session_;
  Ort::IoBinding binding_;
};

}  // namespace autosteer
