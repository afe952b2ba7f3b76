/* AutoSteer as C functions: load a package, ask it, read the guarded answer. Text is UTF-8.
 *
 * Functions that return int return 0, or the exit code that autosteer-run has for the same error; autosteer_error()
 * then says in one line what is wrong. No exception leaves these functions, and nothing is written to stdout or stderr.
 * An engine may be used by several threads at once; a request, a stream or a conversation by one at a time. Whatever
 * has been made is released once, by its own function; all of these take NULL, too, and the order does not matter.
 * A NULL where something is needed is an error. Not checked, and undefined: a handle that was released, two threads
 * in one stream, a buffer that is smaller than said, an engine used after fork() in the child, and a package whose
 * files are written to while it is loaded (its weights are mapped: put a new folder in its place, and open that).
 *
 * docs/embedding.md has whole programs.
 */
#ifndef AUTOSTEER_AUTOSTEER_H
#define AUTOSTEER_AUTOSTEER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AUTOSTEER_API __attribute__((visibility("default")))

/* What this header promises. It changes when a program has to be compiled again; fields and functions that are added do
 * not change it. The library's file name ends with it: libautosteer.so.1. */
#define AUTOSTEER_ABI 1

/* What functions return. */
enum {
  AUTOSTEER_OK = 0,
  AUTOSTEER_FAILED = 1,       /* anything else: no memory, the system, another ABI */
  AUTOSTEER_BAD_PACKAGE = 3,  /* missing, damaged, or its gate does not work here */
  AUTOSTEER_BAD_DEVICE = 4,   /* no onnxruntime, or too old a one */
  AUTOSTEER_BAD_INPUT = 5,    /* a prompt, picture, option or request is unusable, or too long */
  AUTOSTEER_CANCELLED = 130   /* by autosteer_cancel */
};

typedef struct autosteer_engine autosteer_engine;             /* a loaded package */
typedef struct autosteer_image autosteer_image;               /* a picture in memory */
typedef struct autosteer_request autosteer_request;           /* a dialogue, and how to answer it */
typedef struct autosteer_stream autosteer_stream;             /* an answer, while it is made */
typedef struct autosteer_conversation autosteer_conversation; /* what the turns of a dialogue share */

/* --- the library --------------------------------------------------------------------------------------------------*/

/* "0.1.0", and the ABI it was built with. */
AUTOSTEER_API const char *autosteer_version(void);
AUTOSTEER_API int autosteer_abi(void);

/* The error of this thread's last failed call, in one line of valid UTF-8, until the thread's next one that fails. */
AUTOSTEER_API const char *autosteer_error(void);

/* Where lines for an operator go: a prober that fails (its prompt then counts as unsafe), and onnxruntime's own errors.
 * Never a prompt. NULL: nowhere, as at first. One for the whole process; called by any thread, one at a time. It must
 * not call the library and must not longjmp; an exception of it ends there. */
typedef void (*autosteer_log)(const char *line, void *context);
AUTOSTEER_API void autosteer_set_log(autosteer_log log, void *context);

/* --- an engine ----------------------------------------------------------------------------------------------------*/

/* Check and load a package (a folder). options: NULL, or JSON with any of
 *     {"threads": at most 4 for each CPU of the machine; 0 for every CPU that this process may use,
 *      "max_tiles": cut a picture into at most this many tiles,
 *      "low_memory": true to load the image graph for each picture, and drop it afterwards,
 *      "files": false to refuse requests that name files (JSON from somebody else could read yours),
 *      "policy": that of every request; one whose JSON has "policy", "threshold", "strength", "pieces",
 *                "judge_answers" or a trusted message is refused (JSON from somebody else could turn the gate off),
 *      "judge_answers": whether to judge the answers of requests that do not say it (below); else the package says it,
 *      "advise_pages": true to ask Linux for huge pages and to give back pages that only loading reads; this advises on
 *                      every mapping of the process that grows during the call,
 *      "onnxruntime": path of libonnxruntime.so, or of its folder; else $AUTOSTEER_ONNXRUNTIME, else the usual places,
 *      "audit": a file that a line of JSON is appended to for each request; autosteer_next fails where it cannot be
 *               written (docs/security.md),
 *      "audit_texts": true for lines with the words of prompts and answers, not only their digests}
 * An unknown key is an error. */
AUTOSTEER_API int autosteer_open(const char *package, const char *options, autosteer_engine **engine);
AUTOSTEER_API void autosteer_close(autosteer_engine *engine);

/* C and C++ programs call this one, by the name of the other: it fails if this header is not the library's. */
AUTOSTEER_API int autosteer_open_abi(int abi, const char *package, const char *options, autosteer_engine **engine);
#define autosteer_open(package, options, engine) autosteer_open_abi(AUTOSTEER_ABI, package, options, engine)

/* What a package is. Valid as long as the engine. */
typedef struct autosteer_info {
  const char *precision;   /* "fp32", "fp16", "int8", "int4" */
  const char *onnxruntime; /* its version */
  int64_t context_length;  /* most tokens of a prompt and its answer together */
  int guarded;             /* 0: it has no gate, and runs with policy "off" only */
  int takes_images, takes_videos;
  double threshold, strength; /* the defaults of requests; 0 without a gate */
} autosteer_info;
AUTOSTEER_API const autosteer_info *autosteer_describe(const autosteer_engine *engine);

/* --- pictures -----------------------------------------------------------------------------------------------------*/

/* A picture from 8-bit pixels: rows from the top, red, green, blue; `stride` bytes from one row to the next, or 0 for
 * 3 * width. The data, `stride * height` bytes, is copied. */
AUTOSTEER_API int autosteer_image_from_rgb(int64_t width, int64_t height, int64_t stride, const uint8_t *data,
                                           autosteer_image **image);

/* A picture from the bytes of a PNG or JPEG file, or from such a file. */
AUTOSTEER_API int autosteer_image_from_bytes(const void *data, size_t size, autosteer_image **image);
AUTOSTEER_API int autosteer_image_from_file(const char *path, autosteer_image **image);

AUTOSTEER_API void autosteer_image_free(autosteer_image *image);

/* --- a request ----------------------------------------------------------------------------------------------------*/

/* A request from JSON, or an empty one from NULL:
 *     {"messages": [{"role": "system" | "user" | "assistant", "parts": ["text", {"image": "file.png"},
 *                   {"video": ["frame1.png", "frame2.png", ...], "seconds": [0, 0.5, ...]}, ...],
 *                   "trusted": true | false}, ...],
 *      "policy": "steer" | "stop" | "report" | "off", "threshold": number, "strength": number,
 *      "pieces": true | false, "judge_answers": true | false,
 *      "sampling": {"max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
 *                    "presence_penalty", "frequency_penalty", "logit_bias": {"token id": number, ...}, "seed",
 *                    "stop": [text, ...], "speculate": true | false}}
 * Only "messages" is required, of a message "role" and "parts". {"messages": [], "policy": "stop"} is an empty request
 * with settings, to be filled by the functions below. Without settings: "steer", the package's threshold and strength,
 * turns read in pieces, and steered answers judged before they are shown (without, prompts of several sentences start
 * two to three times as fast, and can hide a request), other answers judged if the package says so (with
 * "judge_answers" each comes whole, once the gate has read it as the dialogue's next turn), the likeliest token each
 * time ("temperature": 0), at most 256 tokens. An unknown key is an error.
 * What messages contain is checked when an answer is computed. A request may be run any number of times, and be added
 * to in between. */
AUTOSTEER_API int autosteer_request_new(const char *json, autosteer_request **request);
AUTOSTEER_API void autosteer_request_free(autosteer_request *request);

/* Begin a message of "system", "user" or "assistant"; add to the message begun last. Texts need no escaping. */
AUTOSTEER_API int autosteer_request_turn(autosteer_request *request, const char *role);
AUTOSTEER_API int autosteer_request_text(autosteer_request *request, const char *text);
AUTOSTEER_API int autosteer_request_image(autosteer_request *request, const autosteer_image *image);
AUTOSTEER_API int autosteer_request_video(autosteer_request *request, const autosteer_image *const *frames,
                                          size_t count);

/* The same, with the second at which each frame is shown, from the video's beginning and ascending. Without, a video
 * has 24 frames a second. Models of the Qwen-VL families read it. */
AUTOSTEER_API int autosteer_request_video_at(autosteer_request *request, const autosteer_image *const *frames,
                                             const double *seconds, size_t count);

/* Say that your program wrote the message begun last: a system turn, or an answer of ours. The gate does not judge it,
 * unless it is the last. A request with a trusted user turn is refused when it is run. */
AUTOSTEER_API int autosteer_request_trust(autosteer_request *request);

/* Tokens of the prompt, those of pictures and videos included (which are encoded for it). The decoder does not run. */
AUTOSTEER_API int autosteer_count_tokens(const autosteer_engine *engine, const autosteer_request *request,
                                         int64_t *count);

/* What the gate makes of a request's prompt, without an answer: half of the model reads it. The outputs mean the same
 * as in autosteer_chunk; NULL for what you do not need. Cannot be cancelled. */
AUTOSTEER_API int autosteer_score(const autosteer_engine *engine, const autosteer_request *request, const char **action,
                                  int *unsafe, double *p_unsafe);

/* --- an answer ----------------------------------------------------------------------------------------------------*/

/* A piece of an answer. */
typedef struct autosteer_chunk {
  const char *json;          /* everything: {"text", "token", "verdict": {...}, "finish_reason", "device", "timings"} */
  const char *text;          /* "" while a character is incomplete */
  const char *finish_reason; /* NULL; of the last piece "stop", "length", or "refused": the refusal text stands in
                              * place of the answer; behind what was shown, if a monitor stopped it */
  const char *action;        /* what the gate did: "pass" (always with "report" and "off"), "steer", "stop" */
  int unsafe;                /* whether the prompt is unsafe; 0 with action "stop": the answer was ("answer" in json) */
  double p_unsafe;           /* its score; NaN if the prober failed (unsafe), or with policy "off" */
  int64_t token;             /* -1 for the text of a refusal */
} autosteer_chunk;

/* Begin an answer. The request is copied, and nothing is computed yet. */
AUTOSTEER_API int autosteer_run(const autosteer_engine *engine, const autosteer_request *request,
                                autosteer_stream **stream);

/* The next piece, or NULL in *chunk after the last one. Valid until the stream's next call. To stop an answer early,
 * end the stream. After an error the stream has ended. */
AUTOSTEER_API int autosteer_next(autosteer_stream *stream, const autosteer_chunk **chunk);

/* From any thread, as long as the stream has not been ended: an autosteer_next that is running returns
 * AUTOSTEER_CANCELLED within an operator's time, also while it reads the prompt; so does the next one. */
AUTOSTEER_API void autosteer_cancel(autosteer_stream *stream);

AUTOSTEER_API void autosteer_end(autosteer_stream *stream);

/* --- a dialogue ---------------------------------------------------------------------------------------------------*/

/* What the turns of a dialogue share: what earlier requests had is not computed again. Each request still has all
 * messages of the dialogue. */
AUTOSTEER_API int autosteer_conversation_begin(const autosteer_engine *engine, autosteer_conversation **conversation);

/* autosteer_run within a dialogue. End the stream before you run the next one; otherwise that one computes all. */
AUTOSTEER_API int autosteer_conversation_run(autosteer_conversation *conversation, const autosteer_request *request,
                                             autosteer_stream **stream);

AUTOSTEER_API void autosteer_conversation_end(autosteer_conversation *conversation);

#ifdef __cplusplus
}
#endif

#endif
