// UTF-8: characters, white space, NFC and NFD, lower case, and ill-formed bytes.
#pragma once

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

#include "errors.hpp"

namespace autosteer {

namespace unicode {

/// Length of the UTF-8 character that begins at `at`, or 0 if none does.
inline size_t character(std::string_view text, size_t at) {
  utf8proc_int32_t codepoint = 0;
  const auto length = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at,
                                       static_cast<utf8proc_ssize_t>(text.size() - at), &codepoint);
  return length > 0 ? static_cast<size_t>(length) : 0;
}

/// A character in UTF-8.
inline std::string encoded(char32_t c) {
  std::array<utf8proc_uint8_t, 4> bytes{};
  const auto length = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), bytes.data());
  return {reinterpret_cast<const char*>(bytes.data()), static_cast<size_t>(length)};
}

inline bool is_valid(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const size_t length = character(text, at);
    if (length == 0) return false;
    at += length;
  }
  return true;
}

/// A valid text mapped by utf8proc.
inline std::string mapped(std::string_view text, int options) {
  utf8proc_uint8_t* found = nullptr;
  const auto length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &found, static_cast<utf8proc_option_t>(options));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(found, std::free);
  if (length < 0) throw InputError(std::string("the prompt cannot be normalised (") + utf8proc_errmsg(length) + ")");
  return {reinterpret_cast<const char*>(found), static_cast<size_t>(length)};
}

/// Canonical composition of a valid text.
inline std::string nfc(std::string_view text) {
  return mapped(text, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
}

/// Canonical decomposition of a valid text.
inline std::string nfd(std::string_view text) {
  return mapped(text, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
}

/// Every character of a valid text in lower case, as Rust's char::to_lowercase has it.
inline std::string lower_case(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    utf8proc_int32_t codepoint = 0;
    at += static_cast<size_t>(utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at,
                                               static_cast<utf8proc_ssize_t>(text.size() - at), &codepoint));
    out += encoded(static_cast<char32_t>(utf8proc_tolower(codepoint)));
    if (codepoint == 0x130) out += "\xCC\x87";  // the one letter that becomes two: i and a dot above
  }
  return out;
}

/// Bytes as text with ill-formed ones replaced by U+FFFD, as Rust's String::from_utf8_lossy does: one for each maximal
/// ill-formed sequence.
inline std::string lossy(std::string_view bytes) {
  std::string out;
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  for (size_t at = 0; at < bytes.size();) {
    if (const size_t length = character(bytes, at)) {
      out += bytes.substr(at, length);
      at += length;
      continue;
    }
    const unsigned char lead = byte(at);
    size_t bad = 1;  // bytes of an incomplete character
    const size_t wanted = lead >= 0xF0 && lead <= 0xF4 ? 4 : lead >= 0xE0 && lead <= 0xEF ? 3 : lead >= 0xC2 ? 2 : 1;
    unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    while (lead <= 0xF4 && bad < wanted && at + bad < bytes.size() && byte(at + bad) >= low && byte(at + bad) <= high) {
      ++bad;
      low = 0x80;
      high = 0xBF;
    }
    out += "\xEF\xBF\xBD";
    at += bad;
  }
  return out;
}

/// The first characters of a text, at most `bytes` long; ill-formed ones are replaced.
inline std::string first_of(std::string_view text, size_t bytes) {
  size_t end = std::min(text.size(), bytes);
  while (end > 0 && end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return lossy(text.substr(0, end));
}

}  // namespace unicode

/// Whether it is one of ASCII's digits.
inline bool is_digit(char c) {
  return '0' <= c && c <= '9';
}

/// `text` without the white space around it: Python's str.strip.
inline std::string_view strip(std::string_view text) {
  const auto space_at = [&](size_t at) -> size_t {  // length of the white-space character there, or 0
    utf8proc_int32_t c = 0;
    const auto length = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at,
                                         static_cast<utf8proc_ssize_t>(text.size() - at), &c);
    const bool space = (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
                       (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
                       c == 0x3000;
    return length > 0 && space ? static_cast<size_t>(length) : 0;
  };
  size_t first = 0;
  while (first < text.size() && space_at(first)) first += space_at(first);
  text.remove_prefix(first);
  while (!text.empty()) {
    size_t at = text.size() - 1;
    while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
    if (!space_at(at)) break;
    text.remove_suffix(text.size() - at);
  }
  return text;
}

}  // namespace autosteer
