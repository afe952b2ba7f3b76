// onnxruntime's C++ interface without its library: that is looked for when the program runs, so that one binary takes
// every version since kOldestOnnxruntime. Where: find_onnxruntime. A process has one onnxruntime, the first engine's.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include "errors.hpp"

namespace autosteer {

constexpr int kOldestOnnxruntime = 21;  // 1.21: also the version of its C interface that is asked for

/// {major, minor}; {0, 0} for text that is not a version.
inline std::pair<int, int> version_numbers(const char* text) {
  int major = 0, minor = 0;
  std::sscanf(text, "%d.%d", &major, &minor);
  return {major, minor};
}

/// A libonnxruntime that is loaded, and stays so.
struct Onnxruntime {
  void* handle;
  const OrtApiBase* base;
  std::filesystem::path file;
};

namespace loading {

namespace fs = std::filesystem;

/// What dlopen is asked for: `where` itself, the libraries in it if it is a folder, or the usual names if it is empty.
inline std::vector<std::string> candidates(const std::string& where) {
  const std::string name = "libonnxruntime.so";
  std::vector<std::string> found;
  if (where.empty()) {
    found = {name + ".1", name};
    constexpr int kNewest = 99;  // Debian has libonnxruntime.so.1.21
    for (int minor = kNewest; minor >= kOldestOnnxruntime; --minor)
      found.push_back(name + ".1." + std::to_string(minor));
    return found;
  }
  std::error_code ignored;
  if (!fs::is_directory(where, ignored)) return {where};
  for (const auto& entry : fs::directory_iterator(where, ignored)) {
    if (entry.path().filename().string().compare(0, name.size(), name) == 0) found.push_back(entry.path().string());
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// OrtGetApiBase of a loaded library, or null.
inline decltype(&OrtGetApiBase) entry(void* library) {
  return reinterpret_cast<decltype(&OrtGetApiBase)>(dlsym(library, "OrtGetApiBase"));
}

/// Load the library at `where`, or by one of the usual names. Throws ProviderError if there is none, or an old one.
inline Onnxruntime load(const std::string& where) {
  const std::string advice = "; install it, or set AUTOSTEER_ONNXRUNTIME to the path of libonnxruntime.so";
  void* library = nullptr;
  std::string reason;
  for (const std::string& name : candidates(where)) {
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library) break;
    const char* said = dlerror();
    if (reason.empty()) reason = said ? said : name;
  }
  if (!library && reason.empty()) reason = where + ": no libonnxruntime.so in this folder";
  if (!library) throw ProviderError("onnxruntime was not found (" + reason + ")" + advice);
  const auto get = entry(library);
  if (!get) throw ProviderError(where + ": this library is not onnxruntime: it has no OrtGetApiBase" + advice);
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(get), &info);
  const Onnxruntime found{library, get(), info.dli_fname ? info.dli_fname : where};
  const char* version = found.base->GetVersionString();
  const OrtApi* api = nullptr;  // GetApi writes to stderr if it has no such version
  if (version_numbers(version) >= std::pair(1, kOldestOnnxruntime)) api = found.base->GetApi(kOldestOnnxruntime);
  if (!api) {
    throw ProviderError(found.file.string() + ": onnxruntime " + version + " is too old; this program needs 1." +
                        std::to_string(kOldestOnnxruntime) + " or newer");
  }
  Ort::InitApi(api);
  return found;
}

}  // namespace loading

/// This process's onnxruntime. The first call that succeeds loads it: from `where` (a file, or a folder with it), else
/// from $AUTOSTEER_ONNXRUNTIME, else by the usual names, as the loader finds them: in the RUNPATH of this library or
/// program, which is where `cmake --install` puts one, in LD_LIBRARY_PATH, and on the system. Nothing else is tried
/// where a place is named. Throws ProviderError if there is none, if it is too old, or if another one is loaded.
inline const Onnxruntime& find_onnxruntime(const std::string& where = "") {
  const char* variable = std::getenv("AUTOSTEER_ONNXRUNTIME");
  static const Onnxruntime found = loading::load(!where.empty() ? where : variable ? variable : "");
  if (where.empty()) return found;
  const std::vector<std::string> wanted = loading::candidates(where);
  const auto is_found = [&](const std::string& name) {
    void* loaded = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
    return loaded && loading::entry(loaded) == loading::entry(found.handle);
  };
  if (std::none_of(wanted.begin(), wanted.end(), is_found)) {
    throw ProviderError(where + ": this process has loaded another onnxruntime, " + found.file.string() +
                        "; it can have only one");
  }
  return found;
}

/// The version of the library, not of the headers.
inline const char* onnxruntime_version() {
  return find_onnxruntime().base->GetVersionString();
}

}  // namespace autosteer
