// Asks one query over Kafka and prints the reply. Node 18 or newer:
//
//   npm install kafkajs && node ask.mjs localhost:9092 UA
//
// docs/wire-protocol.md describes requests and replies. Integers beyond 2^53 need a JSON parser that keeps them.

import { randomUUID } from "node:crypto";
import { Kafka, logLevel, Partitioners } from "kafkajs";

const [broker, carrier] = process.argv.slice(2);
const REPLIES = "node-replies";
const DEADLINE_MS = 10_000;

const kafka = new Kafka({ clientId: "ask", brokers: [broker], logLevel: logLevel.ERROR });
const admin = kafka.admin();
await admin.connect();
if (!(await admin.listTopics()).includes(REPLIES)) {
  await admin.createTopics({ topics: [{ topic: REPLIES, numPartitions: 1 }] });
}

const id = randomUUID();
// Read from where the topic ends now: kafkajs needs a group for that, one of this process alone.
const [{ high }] = await admin.fetchTopicOffsets(REPLIES);
const consumer = kafka.consumer({ groupId: `ask-${id}`, maxWaitTimeInMs: 100 });
// Java's partitioner: the key leads to the partition that owns it, as it does for the records of the table.
const producer = kafka.producer({ createPartitioner: Partitioners.DefaultPartitioner });
await Promise.all([consumer.connect(), producer.connect()]);
await consumer.subscribe({ topic: REPLIES });

const reply = new Promise((resolve, reject) => {
  setTimeout(() => reject(new Error("no reply: does a store worker run?")), DEADLINE_MS).unref();
  consumer.run({
    eachMessage: async ({ message }) => {
      // The first reply counts; others' on the same partition, and second ones, are passed over.
      if (message.key?.toString() === id) resolve(JSON.parse(message.value.toString()));
    },
  });
});
consumer.seek({ topic: REPLIES, partition: 0, offset: high });

const request = {
  id,
  sql: "SELECT carrier, name FROM airlines WHERE carrier = $c",
  params: { c: carrier },
  key: carrier,
  reply_to: REPLIES,
  reply_partition: 0,
  deadline_ms: DEADLINE_MS - 500,
};
await producer.send({ topic: "pintail.query", messages: [{ key: carrier, value: JSON.stringify(request) }] });

try {
  const answer = await reply;
  if (answer.status === "refused") throw new Error(`${answer.code}: ${answer.message} (${answer.hint})`);
  console.log(answer.rows, answer.offsets);
} finally {
  await Promise.all([consumer.disconnect(), producer.disconnect()]);
  await admin.deleteGroups([`ask-${id}`]);
  await admin.disconnect();
}
