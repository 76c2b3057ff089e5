// A client in JavaScript: celery-node, as its README uses it.
//
// In: one JSON argument: broker, backend, queue, protocol, and calls, each with task, args and kwargs.
// Out: one line of JSON for each call, in order: its id, and its result or the error's status and type.

const celery = require("celery-node");

const given = JSON.parse(process.argv[2]);
const client = celery.createClient(given.broker, given.backend, given.queue);
client.conf.TASK_PROTOCOL = given.protocol;

const ANSWER_MILLISECONDS = 30000;

async function answer({ task, args, kwargs }) {
    const sent = client.createTask(task).applyAsync(args, kwargs);
    try {
        return { id: sent.taskId, result: await sent.get(ANSWER_MILLISECONDS) };
    } catch (error) {
        return { id: sent.taskId, error: error.message, type: error.exc_type };
    }
}

Promise.all(given.calls.map(answer))
    .then((answers) => answers.forEach((one) => console.log(JSON.stringify(one))))
    .then(() => client.disconnect());
