/* ask PACKAGE PROMPT: the answer on stdout, what the gate made of the prompt on stderr. */
#include <autosteer/autosteer.h>
#include <stdio.h>

int main(int argc, char **argv) {
  autosteer_engine *engine = NULL;
  autosteer_request *request = NULL;
  autosteer_stream *stream = NULL;
  const autosteer_chunk *chunk = NULL;
  int code;

  if (argc != 3) return fprintf(stderr, "usage: ask PACKAGE PROMPT\n"), 2;
  code = autosteer_open(argv[1], NULL, &engine);
  if (!code) code = autosteer_request_new(NULL, &request);
  if (!code) code = autosteer_request_turn(request, "user");
  if (!code) code = autosteer_request_text(request, argv[2]);
  if (!code) code = autosteer_run(engine, request, &stream);
  while (!code && !(code = autosteer_next(stream, &chunk)) && chunk) {
    printf("%s", chunk->text);
    fflush(stdout);
    if (chunk->finish_reason) fprintf(stderr, "\n[%s, p_unsafe %.3f]\n", chunk->action, chunk->p_unsafe);
  }
  if (code) fprintf(stderr, "ask: %s\n", autosteer_error());
  autosteer_end(stream);
  autosteer_request_free(request);
  autosteer_close(engine);
  return code;
}
