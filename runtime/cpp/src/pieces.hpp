// The pieces of a text that the gate reads one by one, so that harmless words around a request do not drown it. The C++
// side of runtime/pieces.py, which says what they are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
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
constexpr size_t kAct = 4;  // words before a thing, at most, that may say what is done with it: "is it legal to steal"
constexpr size_t kWindow = 10, kStride = 5;  // words that are read at once, and from one window to the next
constexpr size_t kMeant = 4, kMeantBehind = 2, kMeantWords = 2;  // sentences near a pronoun, last words of each before
constexpr size_t kLongest = 80;  // bytes of what stands before many pieces: else long words are read hundreds of times
constexpr double kPiecesOfATurn = 8.0;       // about as many as a turn of several sentences has; one is unsafe, if any

/// What the prober's p_unsafe of a piece counts in its turn: its odds are divided by kPiecesOfATurn. What is no
/// probability stays what it is.
inline double discounted(double p_unsafe) {
  return is_safe(p_unsafe, 1.0) ? p_unsafe / (p_unsafe + kPiecesOfATurn * (1.0 - p_unsafe)) : p_unsafe;
}

constexpr const char* kSpace = " \t\n\v\f\r";  // in a class of characters, as `is_space`

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
  static const Regex word("[" + unspaced + "]{1,2}[" + marks + "]*|[^" + kSpace + unspaced + "]+");
  return word.find_all(text);
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

constexpr const char* kPunctuation =  // in a class of characters
    ",:/|+&()\\[\\]{}<>#=~*^@\\\\`\"\u2013\u2014\u3001\uff0c\uff1a\u00b7\u2022";
constexpr const char* kArticles = "a an the my your his our their some any every each another";
constexpr const char* kConjunctions =
    "and or then but also too plus as_well_as before after while once if when so because";
constexpr const char* kPrepositions =  // and other words that say nothing of what is done with a thing behind them
    "of in on at to for from with by as into than about like is are was be near behind under inside together during "
    "over between through around since until without within against among that which all both";
constexpr const char* kCorrections = "i mean meant rather no wait actually sorry better maybe perhaps even instead";

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

/// Whether `word` is one of `words`, whatever the case of its ASCII letters.
inline bool is_one_of(std::string word, std::string_view words) {
  for (char& c : word) {
    if (c == ' ') return false;
    if ('A' <= c && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  const std::string all = " " + std::string(words) + " ";
  return !word.empty() && all.find(" " + word + " ") != std::string::npos;
}

/// What stands between the blanks of `in_single_blanks`; one empty word if there is none.
inline std::vector<std::string> split_words(std::string_view text) {
  std::vector<std::string> words = {""};
  for (const char c : in_single_blanks(text)) c == ' ' ? void(words.emplace_back()) : void(words.back() += c);
  return words;
}

/// `text` behind what leads to it, if anything does.
inline std::string after(const std::string& lead, const std::string& text) {
  return lead.empty() ? text : lead + " " + text;
}

/// Some words with blanks between them, `most` of them at most.
inline std::string in_a_row(const std::vector<std::string>& words, size_t most) {
  std::string text;
  for (size_t i = 0; i < std::min(most, words.size()); ++i) text += (i ? " " : "") + words[i];
  return text;
}

/// The first words of `text`, at most so many. Of more than kLongest bytes the longest words are left out, so that none
/// of these can hide the others.
inline std::string lead_of(std::string_view text, size_t most) {
  const std::vector<std::string> words = split_words(beginning(text, most));
  std::vector<size_t> shortest(words.size());
  std::iota(shortest.begin(), shortest.end(), 0);
  std::stable_sort(shortest.begin(), shortest.end(),
                   [&](size_t a, size_t b) { return words[a].size() < words[b].size(); });
  std::set<size_t> kept;
  size_t bytes = 0;
  for (const size_t n : shortest) {
    if ((bytes += words[n].size() + 1) <= kLongest + 1) kept.insert(n);
  }
  std::vector<std::string> lead;
  for (const size_t n : kept) lead.push_back(words[n]);
  return in_a_row(lead, lead.size());
}

/// The words of `text` without marks behind them.
inline std::string no_marks(std::string_view text) {
  std::string words = in_single_blanks(text);
  while (!words.empty() && std::string_view(".?!;:,").find(words.back()) != std::string_view::npos) words.pop_back();
  return words;
}

/// Where the things of `text` stand: an article with the word behind it.
inline std::vector<Span> things_in(std::string_view text) {
  static const std::string space = kSpace, signs = kPunctuation;
  static const Regex thing("(?<![A-Za-z])(?:" + any_of(kArticles) + ")[" + space + "]+[" + signs + "]*[^" + signs +
                           space + "][^" + space + "]*");  // not "a =", which is no thing
  return thing.find_all(text);
}

inline std::string_view cut(std::string_view text, const Span& span) {
  return text.substr(span.first, span.second - span.first);
}

/// Each thing in `text`, without marks behind it.
inline std::vector<std::string> things(std::string_view text) {
  std::vector<std::string> found;
  for (const Span& thing : things_in(text)) found.push_back(no_marks(cut(text, thing)));
  return found;
}

/// The last kMeantWords words of `text`, without marks behind them.
inline std::string last_words(std::string_view text) {
  const std::vector<Span> words = words_in(text);
  if (words.empty()) return "";
  return no_marks(text.substr(words[words.size() - std::min(kMeantWords, words.size())].first));
}

/// What stands before the first thing of a sentence, kWindow words at most, without prepositions at its end.
inline std::string head_of(std::string_view sentence) {
  const std::vector<Span> found = things_in(sentence);
  const std::string_view before = found.empty() ? sentence : sentence.substr(0, found.front().first);
  std::vector<std::string> words = split_words(lead_of(before, kWindow));
  while (!words.empty() && is_one_of(words.back(), kPrepositions)) words.pop_back();
  return no_marks(in_a_row(words, words.size()));
}

/// The thing of a clause, if one or two words stand before it; of two or three words without a thing the last.
inline std::optional<std::string> object_of(std::string_view clause) {
  const std::vector<Span> found = things_in(clause);
  const std::vector<std::string> words = split_words(found.empty() ? clause : clause.substr(0, found.front().first));
  const size_t count = words[0].empty() ? 0 : words.size();
  if (!found.empty()) {
    if (count == 0 || count >= kFewestWords) return std::nullopt;
    return std::string(cut(clause, found.front()));
  }
  if (count < 2 || count > kFewestWords) return std::nullopt;
  return words.back();
}

/// A clause that names a thing and no act, without what corrects the clause before; nothing if it is another one.
inline std::optional<std::string> bare_thing(std::string_view clause) {
  std::vector<std::string> said = split_words(clause);
  const auto is_said = [](const std::string& word) { return !is_one_of(no_marks(word), kCorrections); };
  said.erase(said.begin(), std::find_if(said.begin(), said.end(), is_said));
  if (said.empty()) return std::nullopt;
  const size_t count = words_in(in_a_row(said, said.size())).size();
  if (!is_one_of(said[0], kArticles) && count >= kFewestWords) return std::nullopt;
  return no_marks(in_a_row(said, kFewestWords));
}

/// What a sentence of these `clauses` may ask of each of its things; `start`: its first kOpening words.
inline std::vector<std::string> asked_of_things(std::string_view sentence, const std::string& start,
                                                const std::vector<std::string_view>& clauses) {
  std::vector<std::string> asked;
  for (size_t n = 0; n + 1 < clauses.size(); ++n) {  // "steal and wash a kettle"
    const bool is_short = words_in(clauses[n]).size() < (n ? kFewestWords : kWindow);
    if (!is_short || !things_in(clauses[n]).empty()) continue;
    if (const std::optional<std::string> thing = object_of(clauses[n + 1])) {
      asked.push_back(no_marks((n ? start : "") + " " + std::string(clauses[n]) + " " + *thing));
    }
  }
  const std::vector<Span> found = things_in(sentence);
  const std::string head = head_of(sentence);
  for (size_t n = 1; n < clauses.size() && !found.empty(); ++n) {  // "steal a kite, i mean a kettle", "a kite, kettle"
    if (const std::optional<std::string> thing = bare_thing(clauses[n])) asked.push_back(after(head, *thing));
  }
  const std::string lead = things_in(start).empty() ? start : "";
  const std::string no_acts = std::string(kPrepositions) + " " + kConjunctions + " " + kCorrections;
  for (size_t n = 1; n < found.size(); ++n) {
    std::vector<std::string> said = split_words(cut(sentence, {found[n - 1].second, found[n].first}));
    said.erase(said.begin(), said.end() - static_cast<std::ptrdiff_t>(std::min(kAct, said.size())));
    const std::string last = said.back(), thing(cut(sentence, found[n]));
    if (last.empty()) {  // "steal a kite a kettle"
      asked.push_back(no_marks(head + " " + thing));
    } else if (last == no_marks(last) && !is_one_of(last, no_acts)) {  // "draw a kite steal a kettle"
      const auto is_act = [&](const std::string& word) { return !is_one_of(word, no_acts); };
      said.erase(said.begin(), std::find_if(said.begin(), said.end(), is_act));
      asked.push_back(no_marks(lead + " " + in_a_row(said, kAct) + " " + thing));
    }
  }
  return asked;
}

/// The pieces of `text`, in order, without repetition; none if the text is the only one.
inline std::vector<std::string> pieces(std::string_view text) {
  static const Regex between_sentences("[.?!;\n\u2026\u3002\uff01\uff1b\uff1f]+");
  static const std::string space = "[" + std::string(kSpace) + "]", not_space = "[^" + std::string(kSpace) + "]";
  static const std::string signs = kPunctuation;
  static const std::string symbols = "\u2190-\u21ff\u2600-\u27bf\U0001f000-\U0001faff";  // arrows, ticks, emoji
  static const std::string conjunctions = any_of(kConjunctions);
  static const Regex between_clauses(  // also a dash between blanks, and what counts: "1)"
      "[" + signs + symbols + "\t\v\f\r]+|(?<=" + space + ")-+>?(?=" + space + ")|(?<!" + not_space +
      ")[0-9A-Za-z]{1,2}\\)|" + space + "(?:" + conjunctions + ")(?=" + space + ")");
  static const std::string pronouns =
      any_of("it its this that one them these those some another thing things something");
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
    const std::string start = lead_of(sentence, kOpening);
    add_windows(sentence);
    const std::vector<std::string_view> clauses = parts_of(sentence, between_clauses, false);
    add_windows(clauses.front());
    for (size_t k = 1; k < clauses.size(); ++k) add(after(start, beginning(clauses[k], kWindow)));
    for (std::string& asked : asked_of_things(sentence, start, parts_of(sentence, between_clauses, false, 1))) {
      add(std::move(asked));
    }
    if (const std::string asked = lead_of(sentence, kWindow); pronoun.find(asked, 0)) {
      for (size_t k = i - std::min(i, kMeant); k < std::min(i + 1 + kMeantBehind, sentences.size()); ++k) {
        if (k == i) continue;
        const std::vector<std::string> meant = things(sentences[k]);
        if (k < i || meant.empty()) add(last_words(sentences[k]) + "? " + asked);
        for (const std::string& thing : meant) add(thing + "? " + asked);
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
  std::vector<std::string> heads;
  for (const std::string_view sentence : uncut) {
    if (const std::optional<std::string> thing = bare_thing(sentence)) {
      const size_t first = heads.size() - std::min(heads.size(), kMeant);
      for (size_t k = first; k < heads.size(); ++k) add(after(heads[k], *thing));
    }
    if (std::string head = head_of(sentence); words_in(head).size() >= kOpening) heads.push_back(std::move(head));
  }
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
