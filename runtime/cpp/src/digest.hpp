// SHA-256, of texts, files and pictures.
#pragma once

#include <openssl/evp.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "errors.hpp"

namespace autosteer {

/// An incremental hash.
class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) {
      throw Error("libcrypto has no SHA-256");
    }
  }

  void add(const void* data, size_t size) {
    if (EVP_DigestUpdate(context_.get(), data, size) != 1) throw Error("libcrypto cannot hash");
  }

  /// The hash in hexadecimal digits. Call once, after the last `add`.
  std::string hex() {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int size = 0;
    if (EVP_DigestFinal_ex(context_.get(), digest.data(), &size) != 1) throw Error("libcrypto cannot hash");
    std::string digits;
    for (unsigned int i = 0; i < size; ++i) {
      digits += "0123456789abcdef"[digest[i] >> 4];
      digits += "0123456789abcdef"[digest[i] & 15];
    }
    return digits;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

/// The hash of a text's bytes.
inline std::string sha256_of(const std::string& text) {
  Sha256 hash;
  hash.add(text.data(), text.size());
  return hash.hex();
}

/// The hash of a file, read in 1 MiB blocks. Throws PackageError if it cannot be read.
inline std::string sha256(const std::filesystem::path& path) {
  Sha256 hash;
  std::ifstream file(path, std::ios::binary);
  if (!file) throw PackageError(path.string() + ": not readable (" + std::strerror(errno) + ")");
  std::vector<char> block(1 << 20);
  while (file.read(block.data(), static_cast<std::streamsize>(block.size())), file.gcount() > 0) {
    hash.add(block.data(), static_cast<size_t>(file.gcount()));
  }
  return hash.hex();
}

}  // namespace autosteer
