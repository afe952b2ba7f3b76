// Hugging Face's tokenizer.json from C++: byte-level BPE (GPT-2, Llama 3, Qwen 2 and the like), SentencePiece's BPE
// with byte fallback (Llama 2, Vicuna, Mistral, Gemma), and nothing else.
//
//     text -> added tokens cut out -> normaliser -> split by regular expressions -> bytes -> merges -> token ids
//     text -> added tokens cut out -> normaliser -> spaces become U+2581 -> characters, or bytes -> merges -> token ids
//
// Special tokens in the text stay plain text (tokenizers: encode_special_tokens = True). If the file asks for anything
// that is not implemented here, a PackageError names it; ignoring it would silently give wrong ids.
//
// Regular expressions run in Oniguruma: tokenizer.json is written in its dialect, and Python's tokenizers uses it too.
// docs/embedding.md says why the tokenizer is our own.
#pragma once

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <queue>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "errors.hpp"
#include "regex.hpp"
#include "strict_json.hpp"
#include "unicode.hpp"

namespace autosteer {

class Tokenizer {
 public:
  /// Read tokenizer.json. Throws PackageError if it is damaged or neither kind of BPE.
  explicit Tokenizer(const std::filesystem::path& path) {
    try {
      std::ifstream file(path, std::ios::binary);
      load(Json::parse(file, [](int depth, Json::parse_event_t event, Json&) {
        decoding::check_depth(depth, event);
        return true;
      }));
#ifdef __GLIBC__
      malloc_trim(0);  // glibc would keep the tens of megabytes that the JSON document took
#endif
    } catch (const PackageError& err) {
      throw PackageError(path.string() + ": " + err.what());
    } catch (const nlohmann::json::parse_error& err) {  // its message would quote the file's bytes
      throw PackageError(path.string() + ": not a tokenizer (no JSON at byte " + std::to_string(err.byte) + ")");
    } catch (const nlohmann::json::exception& err) {
      throw PackageError(path.string() + ": not a tokenizer (" + err.what() + ")");
    }
  }

  /// Token ids of `text`, without begin or end tokens; special tokens in it are plain text. Throws InputError if it is
  /// not valid UTF-8.
  std::vector<int64_t> encode(std::string_view text) const {
    if (!unicode::is_valid(text)) throw InputError("the prompt is not valid Unicode text");
    std::vector<int64_t> ids;
    for_each_part(text, added_, ids, [&](std::string_view part) {
      std::string normal(part);
      for (const auto& normalise : normalisers_) normal = normalise(normal);
      for_each_part(normal, added_normalised_, ids, [&](std::string_view plain) { encode_plain(plain, ids); });
    });
    return ids;
  }

  /// The bytes of token `id`; empty for special tokens and unknown ids.
  std::string_view bytes(int64_t id) const {
    if (id < 0 || static_cast<size_t>(id) + 1 >= starts_.size()) return {};
    const size_t start = starts_[static_cast<size_t>(id)], end = starts_[static_cast<size_t>(id) + 1];
    return std::string_view(bytes_).substr(start, end - start);
  }

  /// Whether the first space of an answer is dropped.
  bool strips() const { return strips_; }

 private:
  struct AddedToken {
    int64_t id;
    bool special;
  };

  /// Added tokens by their text. Gemma has thousands, so none is compared with a text that it cannot be.
  class AddedTokens {
   public:
    void add(const std::string& content, AddedToken token) {
      first_bytes_.set(static_cast<unsigned char>(content.front()));
      by_length_[content.size()].emplace(content, token);
    }

    /// The longest that stands in `text` at `at`, and its length; null if there is none.
    std::pair<const AddedToken*, size_t> longest_at(std::string_view text, size_t at) const {
      if (!first_bytes_.test(static_cast<unsigned char>(text[at]))) return {nullptr, 0};
      for (const auto& [length, tokens] : by_length_) {
        const auto found = tokens.find(text.substr(at, length));
        if (found != tokens.end()) return {&found->second, length};
      }
      return {nullptr, 0};
    }

   private:
    std::bitset<256> first_bytes_;
    std::map<size_t, std::map<std::string, AddedToken, std::less<>>, std::greater<>> by_length_;
  };

  /// How one step of the pre-tokeniser cuts a text.
  struct Split {
    std::optional<Regex> regex;  ///< absent: `literal`
    std::string literal;
    bool invert = false;            ///< the text between matches is the piece
    bool remove = false;            ///< drop matches (or, inverted, the rest)
    bool add_prefix_space = false;  ///< ByteLevel
    bool cut = true;                ///< ByteLevel without use_regex cuts nothing
  };

  struct Merge {
    uint64_t pair;
    int32_t rank, id;
    bool operator<(const Merge& other) const { return std::tie(pair, rank) < std::tie(other.pair, other.rank); }
  };

  // --- reading the file ---------------------------------------------------------------------------------------------

  [[noreturn]] static void unknown(const std::string& what, const Json& value) {
    throw PackageError(what + " " + decoding::shown(value) + " is not supported by the C++ tokenizer");
  }

  void load(const Json& data) {
    std::vector<std::string> bytes;
    load_model(data.at("model"), bytes);
    for (const Json& token : data.at("added_tokens")) load_added_token(token, bytes);
    if (!ignore_merges_) vocab_ = {};
    starts_.reserve(bytes.size() + 1);
    for (const std::string& token : bytes) {
      starts_.push_back(static_cast<uint32_t>(bytes_.size()));
      bytes_ += token;
    }
    starts_.push_back(static_cast<uint32_t>(bytes_.size()));
    bytes_.shrink_to_fit();
    if (!data.at("normalizer").is_null()) load_normalizer(data["normalizer"]);
    if (fallback_) {
      load_metaspace(data.at("pre_tokenizer"));
    } else {
      load_pre_tokenizer(data.at("pre_tokenizer"));
    }
    load_decoder(data.at("decoder"));
  }

  /// `bytes`: receives the bytes of each token, by id.
  void load_model(const Json& model, std::vector<std::string>& bytes) {
    if (model.at("type") != "BPE") unknown("model", model.at("type"));
    fallback_ = model.value("byte_fallback", false);  // then no character is unknown
    for (const char* key : {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"}) {
      if (fallback_ && key == std::string_view("unk_token")) continue;
      if (model.contains(key) && !model[key].is_null() && model[key] != "") unknown(key, model[key]);
    }
    if (model.value("fuse_unk", false) && !fallback_) unknown("fuse_unk", model["fuse_unk"]);
    ignore_merges_ = model.value("ignore_merges", false);
    if (fallback_ && ignore_merges_) unknown("ignore_merges", model["ignore_merges"]);
    const Json& vocab = model.at("vocab");
    vocab_.reserve(vocab.size());
    for (const auto& item : vocab.items()) {
      const auto id = item.value().get<int64_t>();
      if (id < 0 || id > 1 << 24) unknown("token id", item.value());
      vocab_.emplace(item.key(), id);
      set_bytes(bytes, id, decoded(item.key()));
      if (fallback_ && unicode::character(item.key(), 0) == item.key().size()) characters_.emplace(item.key(), id);
    }
    next_added_id_ = static_cast<int64_t>(vocab.size());
    const auto id_of = [&](const std::string& token) {
      const auto found = vocab_.find(token);
      if (found == vocab_.end()) throw PackageError("merge of '" + token + "', which is not in the vocabulary");
      return found->second;
    };
    const Json& merges = model.at("merges");
    merges_.reserve(merges.size());
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      const auto [left, right] = merge_parts(merges[rank]);
      merges_.push_back(
          {pair_key(id_of(left), id_of(right)), static_cast<int32_t>(rank), static_cast<int32_t>(id_of(left + right))});
    }
    std::sort(merges_.begin(), merges_.end());
    for (size_t byte = 0; byte < 256; ++byte) {
      const auto found = vocab_.find(fallback_ ? byte_token(byte) : byte_alphabet()[byte]);
      byte_ids_[byte] = found == vocab_.end() ? -1 : found->second;
      if (fallback_ && byte_ids_[byte] < 0) {
        throw PackageError("no token " + byte_token(byte) + ", although what is unknown becomes bytes");
      }
    }
  }

  /// ["a", "b"], or in older files "a b".
  static std::pair<std::string, std::string> merge_parts(const Json& merge) {
    if (merge.is_array() && merge.size() == 2) return {merge[0].get<std::string>(), merge[1].get<std::string>()};
    const auto text = merge.get<std::string>();
    const size_t space = text.find(' ');
    if (space == std::string::npos) unknown("merge", merge);
    return {text.substr(0, space), text.substr(space + 1)};
  }

  void load_added_token(const Json& token, std::vector<std::string>& bytes) {
    const auto content = token.at("content").get<std::string>();
    const AddedToken added{token.at("id"), token.at("special")};
    if (content.empty()) unknown("added token", token);
    // The library numbers added tokens itself: the vocabulary's id, or one after the last. If the file has another id,
    // no model was trained with it.
    const auto in_vocabulary = vocab_.find(content);
    if (added.id != (in_vocabulary != vocab_.end() ? in_vocabulary->second : next_added_id_)) {
      unknown("the id of added token", token);
    }
    if (in_vocabulary == vocab_.end()) ++next_added_id_;
    if (!added.special && (token.at("single_word") || token.at("lstrip") || token.at("rstrip"))) {
      unknown("added token", token);
    }
    if (!added.special && fallback_ && token.at("normalized")) unknown("added token", token);
    set_bytes(bytes, added.id, added.special ? "" : decoded(content));
    (token.at("normalized").get<bool>() ? added_normalised_ : added_).add(content, added);
  }

  void load_normalizer(const Json& normalizer) {
    if (normalizer.at("type") == "Sequence") {
      for (const Json& part : normalizer.at("normalizers")) load_normalizer(part);
    } else if (normalizer["type"] == "NFC") {
      normalisers_.push_back(unicode::nfc);
    } else if (normalizer["type"] == "Lowercase") {
      normalisers_.push_back(unicode::lower_case);
    } else if (fallback_ && normalizer["type"] == "Prepend") {
      normalisers_.push_back([before = normalizer.at("prepend").get<std::string>()](std::string_view text) {
        return before + std::string(text);
      });
    } else if (fallback_ && normalizer["type"] == "Replace" && normalizer.at("pattern") == Json{{"String", " "}} &&
               normalizer.at("content") == kSpaceLetter) {
      normalisers_.push_back(with_space_letters);
      has_spaces_ = false;
    } else {
      unknown("normalizer", normalizer);
    }
  }

  void load_pre_tokenizer(const Json& step) {
    const std::string type = step.is_object() ? step.at("type").get<std::string>() : "null";
    if (byte_level_) unknown("pre_tokenizer after ByteLevel", step);
    if (type == "Sequence") {
      for (const Json& part : step.at("pretokenizers")) load_pre_tokenizer(part);
      if (!byte_level_) unknown("pre_tokenizer without ByteLevel", step);
    } else if (type == "Split") {
      splits_.push_back(load_split(step));
    } else if (type == "Digits") {
      Split split;
      split.regex.emplace(step.at("individual_digits").get<bool>() ? "\\p{N}" : "\\p{N}+");
      splits_.push_back(std::move(split));
    } else if (type == "ByteLevel") {
      byte_level_ = true;
      Split split;
      split.add_prefix_space = step.at("add_prefix_space").get<bool>();
      split.cut = step.value("use_regex", true);
      split.regex.emplace("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+");
      splits_.push_back(std::move(split));
    } else {
      unknown("pre_tokenizer", step);
    }
    if (splits_.empty()) unknown("pre_tokenizer", step);
  }

  /// Nothing; a cut at spaces, of which the normaliser leaves none (Gemma); or Metaspace.
  void load_metaspace(const Json& step) {
    const Json at_spaces = {{"String", " "}};
    if (step.is_null() || (!has_spaces_ && step.at("type") == "Split" && step.at("pattern") == at_spaces)) return;
    if (step.at("type") != "Metaspace" || step.at("replacement") != kSpaceLetter) unknown("pre_tokenizer", step);
    const auto& scheme = step.at("prepend_scheme");
    if (scheme != "always" && scheme != "never") unknown("prepend_scheme", scheme);
    normalisers_.push_back([always = scheme == "always"](std::string_view text) {
      const std::string out = with_space_letters(text);
      return always && out.compare(0, kSpaceLetter.size(), kSpaceLetter) != 0 ? std::string(kSpaceLetter) + out : out;
    });
    if (!step.at("split").get<bool>()) return;
    Split split;
    const std::string letter(kSpaceLetter);
    split.regex.emplace(letter + "[^" + letter + "]*");
    splits_.push_back(std::move(split));
  }

  void load_decoder(const Json& decoder) {
    if (!fallback_ && decoder.is_object() && decoder.at("type") == "ByteLevel") return;
    if (!fallback_ || !decoder.is_object() || decoder.at("type") != "Sequence") unknown("decoder", decoder);
    Json steps = decoder.at("decoders");
    const Json strip = {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}};
    strips_ = !steps.empty() && steps.back() == strip;
    if (strips_) steps.erase(steps.size() - 1);
    const Json replace = {{"type", "Replace"}, {"pattern", {{"String", kSpaceLetter}}}, {"content", " "}};
    if (steps != Json{replace, {{"type", "ByteFallback"}}, {{"type", "Fuse"}}}) unknown("decoder", decoder);
  }

  static Split load_split(const Json& step) {
    Split split;
    split.invert = step.at("invert").get<bool>();
    split.remove = step.at("behavior") == "Removed";
    if (!split.remove && step["behavior"] != "Isolated") unknown("behavior", step["behavior"]);
    const Json& pattern = step.at("pattern");
    if (pattern.contains("Regex")) {
      split.regex.emplace(pattern["Regex"].get<std::string>());
    } else {
      split.literal = pattern.at("String").get<std::string>();
      if (split.literal.empty()) unknown("pattern", pattern);
    }
    return split;
  }

  static void set_bytes(std::vector<std::string>& bytes, int64_t id, std::string of_token) {
    if (static_cast<size_t>(id) >= bytes.size()) bytes.resize(static_cast<size_t>(id) + 1);
    bytes[static_cast<size_t>(id)] = std::move(of_token);
  }

  // --- bytes as printable characters: GPT-2's alphabet --------------------------------------------------------------

  /// The character for each byte in the vocabulary: itself if it is printable, else the next one from 256 up.
  static const std::array<std::string, 256>& byte_alphabet() {
    static const auto alphabet = [] {
      std::array<std::string, 256> characters;
      uint32_t next = 256;
      for (uint32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
        characters[byte] = unicode::encoded(printable ? byte : next++);
      }
      return characters;
    }();
    return alphabet;
  }

  // --- SentencePiece's tokens ---------------------------------------------------------------------------------------

  static constexpr std::string_view kSpaceLetter = "\xE2\x96\x81";  // U+2581

  static std::string byte_token(size_t byte) {
    constexpr std::string_view digits = "0123456789ABCDEF";
    return std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + '>';
  }

  static std::string with_space_letters(std::string_view text) {
    std::string out;
    for (const char letter : text) {
      if (letter == ' ') {
        out += kSpaceLetter;
      } else {
        out += letter;
      }
    }
    return out;
  }

  /// The bytes of a vocabulary entry.
  std::string decoded(const std::string& token) const {
    if (!fallback_) return byte_level_decode(token);
    if (token.size() == 6 && token.compare(0, 3, "<0x") == 0 && token[5] == '>') {
      for (size_t byte = 0; byte < 256; ++byte) {
        if (token == byte_token(byte)) return std::string(1, static_cast<char>(byte));
      }
    }
    std::string out = token;
    for (size_t at = 0; (at = out.find(kSpaceLetter, at)) != std::string::npos; ++at) {
      out.replace(at, kSpaceLetter.size(), " ");
    }
    return out;
  }

  /// The bytes of a vocabulary entry; an entry with a character outside the alphabet is returned unchanged.
  static std::string byte_level_decode(const std::string& token) {
    static const auto bytes = [] {
      std::unordered_map<std::string_view, char> map;
      for (size_t byte = 0; byte < 256; ++byte) map.emplace(byte_alphabet()[byte], static_cast<char>(byte));
      return map;
    }();
    std::string out;
    for (size_t at = 0; at < token.size();) {
      const size_t length = unicode::character(token, at);
      const auto found = bytes.find(std::string_view(token).substr(at, length));
      if (length == 0 || found == bytes.end()) return token;
      out += found->second;
      at += length;
    }
    return out;
  }

  // --- text to ids --------------------------------------------------------------------------------------------------

  /// Cut the added tokens out of `text`, the leftmost and longest first. Appends their ids to `ids` and calls `rest`
  /// with the text between them. Special tokens stay in the text, but no other token is matched inside them.
  template <class Rest>
  static void for_each_part(std::string_view text, const AddedTokens& tokens, std::vector<int64_t>& ids,
                            const Rest& rest) {
    size_t start = 0;
    for (size_t at = 0; at < text.size();) {
      const auto [token, length] = tokens.longest_at(text, at);
      if (token && !token->special) {
        if (start < at) rest(text.substr(start, at - start));
        ids.push_back(token->id);
        start = at + length;
      }
      at += token ? length : 1;
    }
    if (start < text.size()) rest(text.substr(start));
  }

  void encode_plain(std::string_view text, std::vector<int64_t>& ids) const {
    std::vector<std::string> words = {std::string(text)};
    for (const Split& split : splits_) {
      std::vector<std::string> pieces;
      for (std::string& word : words) {
        if (split.add_prefix_space && word.front() != ' ') word.insert(word.begin(), ' ');
        for (const auto& [first, last] : cut(word, split)) pieces.push_back(word.substr(first, last - first));
      }
      words = std::move(pieces);
    }
    for (const std::string& word : words) merge(word, ids);
  }

  /// The pieces of `word`, none of them empty.
  static std::vector<Span> cut(std::string_view word, const Split& split) {
    std::vector<Span> pieces;
    const auto add = [&](Span piece, bool matches) {
      const bool dropped = split.remove && matches != split.invert;
      if (piece.first < piece.second && !dropped) pieces.push_back(piece);
    };
    size_t done = 0;
    for (size_t from = 0; split.cut && from <= word.size();) {
      std::optional<Span> match;
      if (split.regex) {
        match = split.regex->find(word, from);
      } else if (const size_t at = word.find(split.literal, from); at != std::string_view::npos) {
        match = Span{at, at + split.literal.size()};
      }
      if (!match) break;
      add({done, match->first}, false);
      add(*match, true);
      done = match->second;
      from = match->second > match->first ? match->second : match->second + 1;
      while (from < word.size() && (static_cast<unsigned char>(word[from]) & 0xC0) == 0x80) ++from;
    }
    add({done, word.size()}, false);
    return pieces;
  }

  static uint64_t pair_key(int64_t left, int64_t right) {
    return static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(right);
  }

  /// The pair's merge, or null. Of several, the last in the file (tokenizers uses a HashMap).
  const Merge* merge_of(uint64_t pair) const {
    const auto after = std::upper_bound(merges_.begin(), merges_.end(), pair,
                                        [](uint64_t key, const Merge& merge) { return key < merge.pair; });
    return after == merges_.begin() || std::prev(after)->pair != pair ? nullptr : &*std::prev(after);
  }

  /// Byte-pair encoding of one word: repeatedly merge the pair of lowest rank, the leftmost of several. Uses a heap, so
  /// n letters cost n log n (tokenizers: Word::merge_all).
  void merge(const std::string& word, std::vector<int64_t>& ids) const {
    if (ignore_merges_) {
      std::string token;
      for (const char byte : word) token += byte_alphabet()[static_cast<unsigned char>(byte)];
      if (const auto found = vocab_.find(token); found != vocab_.end()) return ids.push_back(found->second);
    }
    struct Symbol {
      int64_t id;
      int64_t previous, next;  // remaining neighbours; -1: none
    };
    std::vector<Symbol> symbols;
    const auto add = [&](int64_t id) {
      const auto at = static_cast<int64_t>(symbols.size());
      symbols.push_back({id, at - 1, at + 1});
    };
    for (size_t at = 0; at < word.size();) {
      const size_t length = fallback_ ? unicode::character(word, at) : 1;
      const auto known = fallback_ ? characters_.find(word.substr(at, length)) : characters_.end();
      if (known != characters_.end()) add(known->second);
      for (size_t i = 0; known == characters_.end() && i < length; ++i) {
        const int64_t id = byte_ids_[static_cast<unsigned char>(word[at + i])];
        if (id >= 0) add(id);  // a vocabulary without this byte and without an unknown token drops it
      }
      at += length;
    }
    if (symbols.empty()) return;
    symbols.back().next = -1;

    struct Candidate {
      int64_t rank, at, id;
      bool operator<(const Candidate& other) const { return std::tie(rank, at) > std::tie(other.rank, other.at); }
    };
    std::priority_queue<Candidate> queue;
    const auto merge_at = [&](int64_t at) -> const Merge* {
      const int64_t next = at < 0 ? -1 : symbols[static_cast<size_t>(at)].next;
      if (next < 0) return nullptr;
      return merge_of(pair_key(symbols[static_cast<size_t>(at)].id, symbols[static_cast<size_t>(next)].id));
    };
    const auto consider = [&](int64_t at) {
      if (const Merge* merge = merge_at(at)) queue.push({merge->rank, at, merge->id});
    };
    for (size_t at = 0; at < symbols.size(); ++at) consider(static_cast<int64_t>(at));
    while (!queue.empty()) {
      const Candidate top = queue.top();
      queue.pop();
      Symbol& left = symbols[static_cast<size_t>(top.at)];
      const Merge* merge = left.id < 0 ? nullptr : merge_at(top.at);
      if (!merge || merge->id != top.id) continue;  // stale: one of the two was merged with something else
      Symbol& right = symbols[static_cast<size_t>(left.next)];
      left.id = top.id;
      left.next = right.next;
      right.id = -1;
      right.next = -1;
      if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = top.at;
      consider(left.previous);
      consider(top.at);
    }
    for (int64_t at = 0; at >= 0; at = symbols[static_cast<size_t>(at)].next) {
      ids.push_back(symbols[static_cast<size_t>(at)].id);
    }
  }

  std::unordered_map<std::string, int64_t> vocab_;  // kept only for ignore_merges
  std::unordered_map<std::string, int64_t> characters_;  // with byte fallback: the vocabulary's single characters
  std::vector<Merge> merges_;                            // sorted
  std::array<int64_t, 256> byte_ids_{};
  std::string bytes_;             // of all ids, concatenated
  std::vector<uint32_t> starts_;  // in bytes_, by id, and the end
  AddedTokens added_, added_normalised_;
  std::vector<Split> splits_;
  int64_t next_added_id_ = 0;
  std::vector<std::function<std::string(std::string_view)>> normalisers_;  // in order
  bool ignore_merges_ = false, byte_level_ = false, fallback_ = false, strips_ = false, has_spaces_ = true;
};

}  // namespace autosteer
