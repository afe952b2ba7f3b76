// The pieces of a text that the gate reads one by one, so that harmless words around a request do not drown it. The C++
// side of runtime/pieces.py, which says what they are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gate.hpp"
#include "regex.hpp"

namespace autosteer {

constexpr size_t kFewestWords = 3;           // of a piece, if the text has so many
constexpr size_t kShort = 5;                 // words; a sentence of fewer is a fragment
constexpr size_t kOpening = 3;               // words of a sentence in front of later clauses and fragments
constexpr size_t kWindow = 10, kStride = 5;  // words that are read at once, and from one window to the next
constexpr size_t kMeant = 4, kMeantWords = 2;  // sentences before a pronoun, and of the last words of each
constexpr double kPiecesOfATurn = 8.0;       // about as many as a turn of several sentences has; one is unsafe, if any

/// What the prober's p_unsafe of a piece counts in its turn: its odds are divided by kPiecesOfATurn. What is no
/// probability stays what it is.
inline double weighed(double p_unsafe) {
  return is_safe(p_unsafe, 1.0) ? p_unsafe / (p_unsafe + kPiecesOfATurn * (1.0 - p_unsafe)) : p_unsafe;
}

/// ASCII white space.
inline bool is_space(char c) {
  return c == ' ' || ('\t' <= c && c <= '\r');
}

/// The words of a text: what stands between ASCII white space; of Chinese and Japanese, written without blanks, two
/// characters with the marks behind them.
inline std::vector<Span> words_in(std::string_view text) {
  static const std::string unspaced =
      "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af";
  static const std::string marks = ",.?!;:\u2026\u3000-\u303f\uff01-\uff0f\uff1a-\uff20";
  static const Regex word("[" + unspaced + "]{1,2}[" + marks + "]*|[^ \t\n\v\f\r" + unspaced + "]+");
  std::vector<Span> words;
  std::optional<Span> found = word.find(text, 0);
  for (; found; found = word.find(text, found->second)) words.push_back(*found);
  return words;
}

/// `text` with one blank for each ASCII white space, and none around it; a piece that has all of its words.
inline std::string in_single_blanks(std::string_view text) {
  std::string unbroken;
  for (size_t at = 0; at < text.size(); ++at) {
    if (is_space(text[at])) continue;
    if (!unbroken.empty() && is_space(text[at - 1])) unbroken += ' ';
    unbroken += text[at];
  }
  return unbroken;
}

/// The parts of `text` without what is `between` them; with `marks` that stays at the end of the part before. A part of
/// less than `fewest` words is joined with the next if that is as short, or if it is the first, and else with the
/// one before.
inline std::vector<std::string_view> parts_of(std::string_view text, const Regex& between, bool marks,
                                              size_t fewest = kFewestWords) {
  const std::vector<Span> words = words_in(text);
  const auto word_count = [&](const Span& part) {
    const auto begins_before = [](const Span& word, size_t place) { return word.first < place; };
    const auto ends_behind = [](size_t place, const Span& word) { return place < word.second; };
    const auto end = std::lower_bound(words.begin(), words.end(), part.second, begins_before);
    return static_cast<size_t>(end - std::upper_bound(words.begin(), words.end(), part.first, ends_behind));
  };
  const auto is_short = [&](const Span& part) { return word_count(part) < fewest; };
  std::vector<Span> parts;
  const auto join_back = [&] {
    const size_t end = parts.back().second;
    parts.pop_back();
    parts.back().second = end;
  };
  for (size_t begin = 0; begin < text.size();) {
    const Span gap = between.find(text, begin).value_or(Span{text.size(), text.size()});
    const Span part = {begin, marks ? gap.second : gap.first};
    begin = gap.second;
    if (word_count(part) == 0) continue;
    if (parts.empty() || !is_short(parts.back())) {
      parts.push_back(part);
    } else if (parts.size() == 1 || is_short(part)) {
      parts.back().second = part.second;
    } else {
      join_back();
      parts.push_back(part);
    }
  }
  if (parts.size() > 1 && is_short(parts.back())) join_back();
  std::vector<std::string_view> texts;
  for (const auto& [begin, end] : parts) texts.push_back(text.substr(begin, end - begin));
  return texts.empty() ? std::vector<std::string_view>{text} : texts;
}

/// At most `most` of the `words` in `text`, from number `first` on.
inline std::string joined(std::string_view text, const std::vector<Span>& words, size_t first, size_t most) {
  if (words.empty()) return "";
  const size_t begin = words[first].first, last = std::min(first + most, words.size()) - 1;
  return in_single_blanks(text.substr(begin, words[last].second - begin));
}

/// The first words of `text`, at most so many.
inline std::string beginning(std::string_view text, size_t most) {
  return joined(text, words_in(text), 0, most);
}

/// The words of `text`, kWindow at a time; nothing if it has none.
inline std::vector<std::string> windows_of(std::string_view text) {
  const std::vector<Span> words = words_in(text);
  std::vector<std::string> windows;
  const size_t last = words.size() > kWindow ? words.size() - kWindow : 0;
  for (size_t first = 0; first < last; first += kStride) windows.push_back(joined(text, words, first, kWindow));
  if (!words.empty()) windows.push_back(joined(text, words, last, kWindow));
  return windows;
}

/// A pattern of some words, whatever the case of their ASCII letters. Of "(?i)" Python and Oniguruma have different
/// ideas.
inline std::string any_of(std::string_view words) {
  std::string pattern;
  for (const char c : words) {
    if ('a' <= c && c <= 'z') {
      pattern += {'[', c, static_cast<char>(c - 'a' + 'A'), ']'};
    } else {
      pattern += c == ' ' ? '|' : ' ';
    }
  }
  return pattern;
}

/// What "it" may mean behind the sentence `text`, without marks behind it: its last kMeantWords words, and each article
/// with the word behind it.
inline std::vector<std::string> meant_by(std::string_view text) {
  static const Regex thing("(?<![A-Za-z])(?:" + any_of("a an the my some") + ")[ \t\n\v\f\r]+[^ \t\n\v\f\r]+");
  const std::vector<Span> words = words_in(text);
  const size_t first = words.size() > kMeantWords ? words.size() - kMeantWords : 0;
  std::vector<std::string> found = {words.empty() ? "" : in_single_blanks(text.substr(words[first].first))};
  std::optional<Span> next = thing.find(text, 0);
  for (; next; next = thing.find(text, next->second)) {
    found.push_back(in_single_blanks(text.substr(next->first, next->second - next->first)));
  }
  for (std::string& one : found) {
    while (!one.empty() && std::string_view(".?!;:,").find(one.back()) != std::string_view::npos) one.pop_back();
  }
  return found;
}

/// The pieces of `text`, in order, without repetition; none if the text is the only one.
inline std::vector<std::string> pieces(std::string_view text) {
  static const Regex between_sentences("[.?!;\n\u2026\u3002\uff01\uff1b\uff1f]+");
  static const std::string space = "[ \t\n\v\f\r]", not_space = "[^ \t\n\v\f\r]";
  static const std::string signs = ",:/|+&()\\[\\]{}<>#=~*^@\\\\`\"\u2013\u2014\u3001\uff0c\uff1a\u00b7\u2022";
  static const std::string symbols = "\u2190-\u21ff\u2600-\u27bf\U0001f000-\U0001faff";  // arrows, ticks, emoji
  static const std::string conjunctions =
      any_of("and or then but also too plus as_well_as before after while once if when so because");
  static const Regex between_clauses(  // also a dash between blanks, and what counts: "1)"
      "[" + signs + symbols + "]+|(?<=" + space + ")-+>?(?=" + space + ")|(?<!" + not_space + ")[0-9A-Za-z]{1,2}\\)|" +
      space + "(?:" + conjunctions + ")(?=" + space + ")");
  static const std::string pronouns = any_of("it its this that one them these those some another");
  static const Regex pronoun("(?<![A-Za-z])(?:" + pronouns + ")(?![A-Za-z])");
  std::vector<std::string> found;
  std::set<std::string> known;
  const auto add = [&](std::string piece) {
    if (known.insert(piece).second) found.push_back(std::move(piece));
  };
  const auto add_windows = [&](std::string_view part) {
    for (std::string& window : windows_of(part)) add(std::move(window));
  };
  const std::vector<std::string_view> sentences = parts_of(text, between_sentences, true);
  std::string opening;  // of the latest sentence that is no fragment, or of the first
  for (size_t i = 0; i < sentences.size(); ++i) {
    const std::string_view sentence = sentences[i];
    const size_t words = words_in(sentence).size();
    const std::string start = beginning(sentence, kOpening);
    add_windows(sentence);
    const std::vector<std::string_view> clauses = parts_of(sentence, between_clauses, false);
    add_windows(clauses.front());
    for (size_t k = 1; k < clauses.size(); ++k) add(start + " " + beginning(clauses[k], kWindow));
    if (const std::string asked = beginning(sentence, kWindow); pronoun.find(asked, 0)) {
      for (size_t k = i - std::min(i, kMeant); k < i; ++k) {
        for (const std::string& one : meant_by(sentences[k])) add(one + "? " + asked);
      }
    }
    if (words < kShort) {
      if (!opening.empty()) add(opening + " " + beginning(sentence, kShort));
      std::string onwards;
      for (size_t k = i; k < std::min(i + kWindow, sentences.size()); ++k) onwards += std::string(sentences[k]) + " ";
      add(beginning(onwards, kWindow));
    }
    if (opening.empty() || words >= kShort) opening = start;
  }
  const std::vector<std::string_view> uncut = parts_of(text, between_sentences, true, 1);
  size_t count = 0;
  std::string fragments;
  for (const std::string_view sentence : uncut) {
    if (words_in(sentence).size() < kShort) fragments += (count++ ? " " : "") + std::string(sentence);
  }
  const bool enough = words_in(fragments).size() >= kFewestWords;
  if (1 < count && count < uncut.size() && enough) add_windows(fragments);
  const std::vector<Span> words = words_in(text);
  const size_t begin = words.empty() ? 0 : words.front().first, end = words.empty() ? 0 : words.back().second;
  const bool whole = found.size() == 1 && found[0] == text.substr(begin, end - begin);
  return whole ? std::vector<std::string>() : found;
}

}  // namespace autosteer
