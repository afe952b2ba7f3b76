// autosteer.json, read as strictly as runtime/manifest.py reads it: an unknown key, a missing one, a wrong type, a
// wrong hash and a path that leaves the folder are each a PackageError.
//
//     manifest_format.hpp   the structs
//     manifest_decode.hpp   JSON -> structs
//     manifest_checks.hpp   what must agree with what
//     here                  reads the file, and compares the package's files with their hashes
#pragma once

#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>

#include "digest.hpp"
#include "errors.hpp"
#include "manifest_checks.hpp"
#include "manifest_decode.hpp"
#include "manifest_format.hpp"
#include "strict_json.hpp"

namespace autosteer {

constexpr int kFormatVersion = 5;
constexpr const char* kManifestFile = "autosteer.json";

/// Whether `digest` is the SHA-256 of `text`, a manifest, with as many zeros in its place.
inline bool is_signed(std::string text, const std::string& digest) {
  const std::string unsigned_digest(64, '0');
  if (digest.size() != unsigned_digest.size() || digest == unsigned_digest) return false;
  for (size_t at = text.find(digest); at != std::string::npos; at = text.find(digest, at)) {
    text.replace(at, digest.size(), unsigned_digest);
  }
  return sha256_of(text) == digest;
}

inline Manifest Manifest::load(const fs::path& folder) {
  const fs::path path = folder / kManifestFile;
  std::error_code ignored;
  if (!fs::exists(path, ignored)) {
    throw PackageError(folder.string() + ": no " + kManifestFile + " here; is this a folder made by autosteer-export?");
  }
  if (!fs::is_regular_file(path, ignored)) {  // never wait for a pipe
    throw PackageError(path.string() + ": not readable as JSON (not a file)");
  }
  std::string text;
  Json data;
  try {
    std::ifstream file(path, std::ios::binary);
    text.assign(std::istreambuf_iterator<char>(file), {});
    data = decoding::parse_strictly(text);
  } catch (const Json::parse_error& err) {  // its message would quote the file's bytes
    throw PackageError(path.string() + ": not readable as JSON (at byte " + std::to_string(err.byte) + ")");
  } catch (const std::exception& err) {
    throw PackageError(path.string() + ": not readable as JSON (" + err.what() + ")");
  }
  const Json version = data.is_object() && data.contains("format_version") ? data["format_version"] : Json();
  if (version != kFormatVersion) {
    throw PackageError(path.string() + ": format_version " + decoding::shown(version) + ", this runtime reads " +
                       std::to_string(kFormatVersion) + "; export the model again");
  }
  Manifest manifest = decoding::manifest({data, path.string()});
  if (!is_signed(text, data.value("manifest_sha256", ""))) {
    throw PackageError(path.string() +
                       ": its own sha256 differs (damaged or edited); export the package again or copy it again");
  }
  decoding::check_consistency(manifest, path.string());
  return manifest;
}

inline void Manifest::verify(const fs::path& folder) const {
  std::error_code unknown;
  if (paths().count("weights.bin") == 0 && fs::exists(folder / "weights.bin", unknown)) {
    throw PackageError((folder / "weights.bin").string() + ": has no hash in " + kManifestFile +
                       "; export the package again");
  }
  std::map<std::string, uintmax_t> sizes;  // of `files`; graphs have none
  for (const DataFile& data : files) sizes[data.file] = static_cast<uintmax_t>(data.bytes);
  for (const auto& [file, expected] : paths()) {
    const fs::path path = folder / file;
    if (std::error_code ignored; !fs::is_regular_file(path, ignored)) {
      throw PackageError(path.string() + ": missing; export the package again or copy it again");
    }
    std::error_code unread;
    if (const auto size = sizes.find(file); size != sizes.end() && fs::file_size(path, unread) != size->second) {
      throw PackageError(path.string() + ": its size differs from " + kManifestFile +
                         " (package damaged or edited); export it again or copy it again");
    }
    if (sha256(path) != expected) {
      throw PackageError(path.string() + ": sha256 differs from " + kManifestFile +
                         " (package damaged or edited); export it again or copy it again");
    }
  }
}

}  // namespace autosteer
