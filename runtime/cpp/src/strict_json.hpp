// JSON, read strictly: the C++ side of runtime/strict_json.py. Unknown keys, missing keys, values of another type and
// keys given twice are errors that name the path.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "unicode.hpp"

namespace autosteer {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

template <class T>
OrderedJson or_null(const std::optional<T>& value) {
  return value ? OrderedJson(*value) : OrderedJson(nullptr);
}

namespace decoding {

constexpr int kMaxDepth = 64;  // of arrays and objects in each other: deeper ones would overflow the stack elsewhere

/// Refuse an array or object that begins `depth` levels deep.
inline void check_depth(int depth, Json::parse_event_t event) {
  const bool opens = event == Json::parse_event_t::array_start || event == Json::parse_event_t::object_start;
  if (opens && depth >= kMaxDepth) throw PackageError("nested deeper than " + std::to_string(kMaxDepth) + " levels");
}

/// The beginning of a value's text, for errors.
inline std::string shown(const Json& value) {
  return unicode::first_of(value.dump(-1, ' ', false, Json::error_handler_t::replace), 60);
}

/// A JSON value and its path. Each `as_...` throws PackageError if the value does not fit.
class Node {
 public:
  Node(const Json& data, std::string where) : data_(data), where_(std::move(where)) {}

  [[noreturn]] void fail(const std::string& what) const { throw PackageError(where_ + ": " + what); }

  /// Check that this is an object with all `required` keys, and no others but `optional` ones.
  const Node& object(const std::vector<std::string>& required, const std::vector<std::string>& optional = {}) const {
    if (!data_.is_object()) fail("expected an object");
    for (const auto& item : data_.items()) {
      if (!contains(required, item.key()) && !contains(optional, item.key())) fail("unknown key '" + item.key() + "'");
    }
    for (const auto& key : required) {
      if (!data_.contains(key)) fail("missing key '" + key + "'");
    }
    return *this;
  }

  bool has(const std::string& key) const { return data_.contains(key); }
  bool is_null() const { return data_.is_null(); }
  bool is_string() const { return data_.is_string(); }
  Node operator[](const std::string& key) const { return {data_.at(key), where_ + ": " + key}; }

  std::string as_string() const {
    if (!data_.is_string()) misfit("str");
    return data_.get<std::string>();
  }

  std::string as_one_of(const std::vector<std::string>& words) const {
    if (!data_.is_string() || !contains(words, data_.get<std::string>())) misfit("one of a fixed set");
    return data_.get<std::string>();
  }

  bool as_bool() const {
    if (!data_.is_boolean()) misfit("bool");
    return data_.get<bool>();
  }

  int64_t as_int() const {
    if (!data_.is_number_integer() || (data_.is_number_unsigned() && data_.get<uint64_t>() > INT64_MAX)) misfit("int");
    return data_.get<int64_t>();
  }

  /// A size: at least 1, and small enough that products of sizes do not overflow.
  int64_t as_size() const {
    const int64_t value = as_int();
    if (value < 1 || value > INT32_MAX) misfit("a size");
    return value;
  }

  double as_float() const {
    if (!data_.is_number() || !std::isfinite(data_.get<double>())) misfit("float");
    return data_.get<double>();
  }

  /// Elements of an array.
  std::vector<Node> items() const {
    if (!data_.is_array()) misfit("tuple");
    std::vector<Node> nodes;
    for (size_t i = 0; i < data_.size(); ++i) nodes.emplace_back(data_[i], where_ + "[" + std::to_string(i) + "]");
    return nodes;
  }

  /// Elements of an object with any keys.
  std::vector<std::pair<std::string, Node>> entries() const {
    if (!data_.is_object()) misfit("dict");
    std::vector<std::pair<std::string, Node>> nodes;
    for (const auto& item : data_.items()) nodes.emplace_back(item.key(), (*this)[item.key()]);
    return nodes;
  }

  /// A fixed number of elements, each read by `read`.
  template <size_t N, class Read>
  auto tuple(Read read) const {
    const auto nodes = items();
    if (nodes.size() != N) misfit("tuple");
    std::array<decltype(read(nodes[0])), N> values{};
    for (size_t i = 0; i < N; ++i) values[i] = read(nodes[i]);
    return values;
  }

  /// Any number of elements, each read by `read`.
  template <class Read>
  auto list(Read read) const {
    std::vector<decltype(read(*this))> values;
    for (const Node& node : items()) values.push_back(read(node));
    return values;
  }

  /// Nothing if the value is null.
  template <class Read>
  auto optional(Read read) const {
    using Value = decltype(read(*this));
    return is_null() ? std::optional<Value>() : std::optional<Value>(read(*this));
  }

 private:
  static bool contains(const std::vector<std::string>& words, const std::string& word) {
    return std::find(words.begin(), words.end(), word) != words.end();
  }

  [[noreturn]] void misfit(const char* expected) const {
    fail(shown(data_) + " does not fit (expected " + expected + ")");
  }

  const Json& data_;
  std::string where_;
};

inline std::string as_string(const Node& node) {
  return node.as_string();
}
inline int64_t as_int(const Node& node) {
  return node.as_int();
}
inline int64_t as_size(const Node& node) {
  return node.as_size();
}
inline double as_float(const Node& node) {
  return node.as_float();
}
/// Parse JSON. Throws PackageError for a key given twice or a byte order mark, which parsers treat differently, for a
/// zero byte, at which this parser would stop, and for more than kMaxDepth levels.
inline Json parse_strictly(const std::string& text) {
  if (text.compare(0, 3, "\xEF\xBB\xBF") == 0) throw PackageError("it begins with a byte order mark");
  if (text.find('\0') != std::string::npos) throw PackageError("it has a zero byte");
  std::vector<std::set<std::string>> open;  // keys seen so far, for each object being parsed
  return Json::parse(text, [&](int depth, Json::parse_event_t event, Json& value) {
    check_depth(depth, event);
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key && !open.back().insert(value.get<std::string>()).second) {
      throw PackageError("key '" + value.get<std::string>() + "' is given twice");
    }
    return true;
  });
}

}  // namespace decoding
}  // namespace autosteer
