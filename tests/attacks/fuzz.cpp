// libFuzzer's targets for the C++ runtime, one by name (AUTOSTEER_FUZZ): what strangers hand over. Only errors of the
// runtime may come out, as valid UTF-8 in one line; the sanitizers see the rest. tests/attacks/run builds and runs
// them.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <unistd.h>

#include "engine.hpp"
#include "json.hpp"

namespace {

namespace fs = std::filesystem;

/// A file with this content, in memory, which is written over by the next one.
fs::path file_of(const std::string& content) {
  static const fs::path path = "/dev/shm/autosteer-fuzz-" + std::to_string(getpid());
  std::ofstream(path, std::ios::binary) << content;
  return path;
}

/// The manifest of a sound package: the one that AUTOSTEER_FUZZ_PACKAGE names.
fs::path package() {
  const char* folder = std::getenv("AUTOSTEER_FUZZ_PACKAGE");
  if (!folder) throw std::runtime_error("AUTOSTEER_FUZZ_PACKAGE: name a package");
  return folder;
}

void manifest(const std::string& text) {
  std::istringstream source(text);
  const autosteer::Json data = autosteer::decoding::parse_strictly(source);
  const autosteer::Manifest found = autosteer::decoding::manifest({data, "fuzz"});
  autosteer::decoding::check_consistency(found, "fuzz");
}

void request(const std::string& text) {
  const auto wanted = autosteer::RequestJson::parse(text);
  wanted.sampling.check();
  autosteer::options_from_json(text);
}

void tokenizer(const std::string& text) {
  const autosteer::Tokenizer found(file_of(text));
  for (const int64_t id : found.encode("a red circle, 12 \xC3\xA9\xE2\x80\x94")) found.bytes(id);
}

void picture(const std::string& bytes) {
  autosteer::read_picture(file_of(bytes));
}

/// Roles, texts and pictures of a dialogue; every probed position must be one of its rows.
void prompt(const std::string& text) {
  static const autosteer::Engine engine(package(), [] {
    autosteer::EngineOptions options;
    options.threads = 1;
    return options;
  }());
  std::vector<autosteer::Message> messages;
  std::istringstream lines(text);
  for (std::string line; messages.size() < 8 && std::getline(lines, line);) {
    if (line.empty()) continue;
    const char* roles[] = {"system", "user", "assistant"};
    const auto kind = static_cast<unsigned char>(line[0]);
    autosteer::Message message{roles[kind % 3], {line.substr(1)}, kind % 3 != 1 && kind % 5 == 0};
    if (kind % 2 && kind % 3 == 1) message.parts.insert(message.parts.begin(), autosteer::Image{1, 1, {1, 2, 3}});
    messages.push_back(std::move(message));
  }
  autosteer::Stats stats;
  const auto prepared = engine.encoder.prepare(messages, stats);
  for (const auto& read : prepared.probed) {
    for (size_t i = 0; i < read.size(); ++i) {
      const bool sound =
          0 <= read[i] && read[i] < static_cast<int64_t>(prepared.keys.size()) && (!i || read[i - 1] < read[i]);
      if (!sound) std::abort();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::map<std::string, std::function<void(const std::string&)>> targets = {{"manifest", manifest},
                                                                                         {"request", request},
                                                                                         {"tokenizer", tokenizer},
                                                                                         {"picture", picture},
                                                                                         {"prompt", prompt}};
  static const auto target = targets.at(std::getenv("AUTOSTEER_FUZZ"));
  try {
    target({reinterpret_cast<const char*>(data), size});
  } catch (const autosteer::Error& err) {
    if (!autosteer::unicode::is_valid(err.what())) std::abort();
  } catch (const autosteer::Json::exception&) {  // the callers of `parse_strictly` make an error of it
  }
  return 0;
}
