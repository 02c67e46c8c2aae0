/**
 * Which buffers move between page and worker.
 */

/**
 * Buffers below this size are copied with their message: moving one costs more than copying so few bytes twice. In
 * Chromium a round trip with five such buffers took 222 microseconds with copies, 240 with moves, and 170 without any.
 */
export const MIN_TRANSFER_BYTES = 1 << 15;
