/* Threads that go through the same stages of work together without sleeping between them.
 *
 * The tasks of all stages are numbered through, and a thread takes the next number when it is done with one. So a thread that the system
 * holds up delays the others by the task it has, not by a share of each stage. A stage's tasks begin when all earlier stages' are done. */

#pragma once

#include <sched.h>
#include <stdatomic.h>

enum { LOOKS_BEFORE_YIELD = 2000 };

typedef struct {
    _Alignas(64) atomic_long taken;
    _Alignas(64) atomic_long done;
} Crew;

/* What a thread knows: the number it has, whether it works on that, and the bounds of the stage. */
typedef struct {
    Crew *crew;
    long number, first, end;
    int is_working;
} Worker;

static inline Worker join(Crew *crew) { return (Worker){crew, atomic_fetch_add(&crew->taken, 1), 0, 0, 0}; }

/* Every thread calls it for every stage, with the same number of tasks. */
static inline void begin_stage(Worker *me, long num_tasks)
{
    me->first = me->end;
    me->end += num_tasks;
}

/* The next task of the stage that is this thread's, -1 where there is none any more. */
static inline long next_task(Worker *me)
{
    if (me->is_working) {
        atomic_fetch_add_explicit(&me->crew->done, 1, memory_order_release);
        me->number = atomic_fetch_add(&me->crew->taken, 1);
        me->is_working = 0;
    }
    if (me->number >= me->end) return -1;
    for (unsigned looks = 0; atomic_load_explicit(&me->crew->done, memory_order_acquire) < me->first; looks++) {
        __builtin_ia32_pause();
        /* Another process may need the core, or this thread's own crew. */
        if (looks % LOOKS_BEFORE_YIELD == LOOKS_BEFORE_YIELD - 1) sched_yield();
    }
    me->is_working = 1;
    return me->number - me->first;
}
