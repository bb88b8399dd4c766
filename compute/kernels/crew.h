/* A crew of threads that works through the same stages and does not sleep between them.
 *
 * The tasks of all stages are numbered consecutively. A thread that has finished a task takes the
 * next number. So a thread that the system has suspended delays the others by one task, not by a
 * share of every stage. The tasks of a stage begin when all tasks of the earlier stages are done.
 *
 *   every thread:  begin_stage, next_task until -1, begin_stage, next_task until -1, ... */

#pragma once

#include <sched.h>
#include <stdatomic.h>

enum { SPINS_BEFORE_YIELD = 2000 };

typedef struct {
    _Alignas(64) atomic_long taken; /* tasks that a thread has taken, done or not */
    _Alignas(64) atomic_long done;
} Crew;

/* The state of one thread. */
typedef struct {
    Crew *crew;
    long number; /* of the task that is this thread's next, or its current one */
    long first;  /* number of the stage's first task */
    long end;    /* number after the stage's last task */
    int is_working;
} Worker;

static inline Worker join(Crew *crew)
{
    return (Worker){crew, atomic_fetch_add(&crew->taken, 1), 0, 0, 0};
}

/* Every thread must call this for every stage, with the same number of tasks. */
static inline void begin_stage(Worker *me, long num_tasks)
{
    me->first = me->end;
    me->end += num_tasks;
}

/* Ends this thread's current task and returns the next one of the stage that it should do, or -1
 * if there is none. */
static inline long next_task(Worker *me)
{
    if (me->is_working) {
        atomic_fetch_add_explicit(&me->crew->done, 1, memory_order_release);
        me->number = atomic_fetch_add(&me->crew->taken, 1);
        me->is_working = 0;
    }
    if (me->number >= me->end) return -1;
    for (unsigned spins = 0;
         atomic_load_explicit(&me->crew->done, memory_order_acquire) < me->first; spins++) {
        __builtin_ia32_pause();
        /* Another process may need the core, or another thread of this crew. */
        if (spins % SPINS_BEFORE_YIELD == SPINS_BEFORE_YIELD - 1) sched_yield();
    }
    me->is_working = 1;
    return me->number - me->first;
}
